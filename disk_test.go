package raft

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"example.com/raft/internal/vfs"
	"example.com/raft/internal/wal"
)

// Segments are released by whole, so that a log begins with records that are
// older than its start, or whose predecessors are gone: the start that a
// segment carries may be older than what was released, and the record that
// tells the new one comes later. All entries after the newest start must be
// recovered all the same. (Simulator, seed 10: "entry 85 follows entry 56".)
func TestDiskStorageRecoversBehindReleasedSegments(t *testing.T) {
	for _, perSave := range []int{1, 3, 8} {
		for _, behind := range []Index{1, 2, 7, 20} {
			t.Run(fmt.Sprintf("%d a save, %d kept", perSave, behind), func(t *testing.T) {
				rng := rand.New(rand.NewPCG(1, uint64(perSave)))
				mem := vfs.NewMem(rng)
				open := func() (*diskStorage, Recovered) {
					d := &diskStorage{fs: mem, dir: "node", tailBytes: 4096, random: func(b []byte) { b[0] = 1 },
						options: wal.Options{MinSegmentBytes: 16384, MaxSegmentBytes: 16384, Rand: rng.Uint64, PrepareInline: true}}
					rec, err := d.Open(context.Background(), Identity{"c", "a"})
					if err != nil {
						t.Fatal(err)
					}
					return d, rec
				}
				d, _ := open()
				lsn, last, start := LSN(0), Index(0), Index(0)
				for range 60 {
					lsn++
					save := Save{LSN: lsn}
					var b entryBuilder
					for range perSave {
						b.add(entryCommand, make([]byte, 600))
					}
					save.Entries = []Entries{b.seal(last+1, 1, simEpoch)}
					last += Index(perSave)
					if rng.IntN(4) == 0 && last > start+behind {
						start = last - behind
						save.Start = &EntryID{start, 1}
					}
					d.Append(save)
					if _, err := d.Flush(); err != nil {
						t.Fatal(err)
					}
					if rng.IntN(5) != 0 {
						continue
					}
					if err := d.log.Prepare(); err != nil { // reclaims what was released
						t.Fatal(err)
					}
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
					var rec Recovered
					d, rec = open()
					lsn = 0
					if rec.Last != last || rec.Start.Index != start {
						t.Fatalf("recovered %v to %d, want %d to %d", rec.Start, rec.Last, start, last)
					}
					for i := start + 1; i <= last; i++ {
						if e, err := d.Read(i, i, 1); err != nil || e[0].First() != i {
							t.Fatalf("entry %d: %v", i, err)
						}
					}
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// The snapshot that has replaced a longer log may be in a segment whose oldest
// entries are beyond the snapshot's end, and the record of an older start
// before them. (Simulator, seed 47: "a log whose oldest entry is 352, without a
// record of where it starts".)
func TestDiskStorageRecoversReplacedLog(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, follow := range []int{0, 1, 3} {
		for at := Index(20); at < 200; at += 9 {
			mem := vfs.NewMem(rng)
			open := func() (*diskStorage, Recovered) {
				d := &diskStorage{fs: mem, dir: "node", tailBytes: 4096, random: func(b []byte) { b[0] = 1 },
					options: wal.Options{MinSegmentBytes: 65536, MaxSegmentBytes: 65536, Rand: rng.Uint64, PrepareInline: true}}
				rec, err := d.Open(context.Background(), Identity{"c", "a"})
				if err != nil {
					t.Fatalf("snapshot up to %d, %d entries behind it: %v", at, follow, err)
				}
				return d, rec
			}
			d, _ := open()
			lsn := LSN(0)
			save := func(s Save) {
				lsn++
				s.LSN = lsn
				d.Append(s)
				if _, err := d.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			for i := Index(1); i <= 200+at%25; i++ {
				s := Save{Entries: []Entries{run(i, 1, 1, 600)}}
				if i == 11 {
					s.Start = &EntryID{9, 1}
				}
				save(s)
			}
			meta := snapshotUpTo(at, 2, 7)
			save(Save{Start: &meta.Last, Snapshot: &meta})
			for i := range follow {
				save(Save{Entries: []Entries{run(at+1+Index(i), 1, 2, 600)}})
			}
			if err := d.log.Prepare(); err != nil { // reclaims what was released
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			d, rec := open()
			if rec.Start != meta.Last || rec.Last != at+Index(follow) || rec.ConfigIndex != 1 || string(rec.Config) != string(meta.Config) {
				t.Fatalf("snapshot up to %d, %d entries behind it: recovered %v to %d, configuration %d", at, follow, rec.Start, rec.Last, rec.ConfigIndex)
			}
			if follow > 0 {
				checkEntries(t, d, at+1, rec.Last, func(Index) Term { return 2 })
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}
