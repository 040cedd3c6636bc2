package raft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

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

// Power is cut, or the process killed, before every operation of the first start
// that changes the disk, and before every one of the start after that. The next
// start goes on in any case, and nobody ever finds a file identity beside a log
// that holds nothing.
func TestFirstStartCrashPoints(t *testing.T) {
	t.Parallel()
	for seed := range uint64(seedCount(3)) {
		rng := rand.New(rand.NewPCG(seed, 2))
		points := [2]int{}
		var start func(mem *vfs.Mem, depth int)
		start = func(mem *vfs.Mem, depth int) {
			mem.SetHook(func(op vfs.Op) error {
				if depth == len(points) || !op.Kind.Changes() || t.Failed() {
					return nil
				}
				points[depth]++
				killed := mem.Clone()
				killed.Kill()
				start(killed, depth+1)
				for _, choose := range []func(int) int{func(int) int { return 0 }, func(n int) int { return min(1, n-1) }, rng.IntN} {
					start(mem.CrashClone(choose), depth+1)
				}
				return nil
			})
			settled := isThere(mem, "node/identity")
			d := memoryDir(mem)
			rec, err := d.Open(t.Context(), Identity{"c", "n"})
			if err != nil || settled && rec.Boot < 2 {
				t.Errorf("seed %d, crash before operation %v: start %d, %v", seed, points, rec.Boot, err)
				return
			}
			mem.SetHook(nil)
			for _, c := range []*vfs.Mem{mem.Clone(), mem.CrashClone(func(int) int { return 0 })} {
				c.Kill()
				if r := memoryDir(c).inspect(t.Context()); r.Err != nil || r.Starts != rec.Boot {
					t.Errorf("seed %d: after start %d: %v", seed, rec.Boot, r)
				}
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		start(vfs.NewMem(rand.New(rand.NewPCG(seed, 1))), 0)
		if points[0] < 15 || points[1] < 15*points[0] {
			t.Errorf("seed %d: only %v points", seed, points)
		}
	}
}

func isThere(mem *vfs.Mem, name string) bool {
	_, err := mem.Stat(name)
	return !errors.Is(err, fs.ErrNotExist)
}

// failOnce makes the n-th operation from here on fail, and returns which that is;
// its Size is -1 until it comes.
func failOnce(mem *vfs.Mem, n int, err error) *vfs.Op {
	failed := &vfs.Op{Size: -1}
	mem.SetHook(func(op vfs.Op) error {
		if n--; n != 0 {
			return nil
		}
		*failed = op
		return err
	})
	return failed
}

// Every operation of the first start fails once. The next start goes on, also
// when the cache was dropped meanwhile.
func TestFirstStartDiskFailures(t *testing.T) {
	broken := errors.New("input/output error")
	for fail := 1; ; fail++ {
		mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
		failed := failOnce(mem, fail, broken)
		d := memoryDir(mem)
		_, err := d.Open(t.Context(), Identity{"c", "n"})
		mem.SetHook(nil)
		if err == nil {
			err = d.Close()
		}
		if failed.Size < 0 {
			if fail < 30 {
				t.Errorf("only %d operations", fail)
			}
			break
		}
		if err != nil && !errors.Is(err, broken) || mem.OpenFiles() != 0 {
			t.Fatalf("operation %d, %+v, failed: %v; %d files are open", fail, failed, err, mem.OpenFiles())
		}
		mem.DropCaches()
		d = memoryDir(mem)
		if _, err := d.Open(t.Context(), Identity{"c", "n"}); err != nil || d.Close() != nil {
			t.Fatalf("operation %d, %+v, failed, and then: %v", fail, failed, err)
		}
	}
}

// A node that voted and has lost its log would vote again. It is refused beside
// its identity, whatever is left of the log, and so is it by Inspect and Recover.
func TestLostLog(t *testing.T) {
	for what, spare := range map[string]func(name string) bool{
		"its files":    func(string) bool { return false },
		"its segments": func(name string) bool { return !strings.HasSuffix(name, ".wal") },
	} {
		mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
		oldDirectory(t, mem, false)
		names, err := mem.List("node/wal")
		if err != nil || len(names) < 2 {
			t.Fatal(names, err)
		}
		for _, name := range names {
			if !spare(name) {
				if err := mem.Remove("node/wal/" + name); err != nil {
					t.Fatal(err)
				}
			}
		}
		mem.SetHook(func(op vfs.Op) error {
			if op.Kind.Changes() && op.Kind != vfs.OpSyncDir {
				t.Errorf("without %s: %+v", what, op)
			}
			return nil
		})
		_, openErr := memoryDir(mem).Open(t.Context(), Identity{"c", "n"})
		_, recoverErr := recoverDirectory(t.Context(), func() *diskStorage { return memoryDir(mem) }, &RecoverOptions{Lost: oldMembers}, time.Now())
		r := memoryDir(mem).inspect(t.Context())
		for _, err := range []error{openErr, recoverErr, r.Err} {
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || corrupt.File != "node/wal" || !strings.Contains(corrupt.Do, "with an empty directory") {
				t.Errorf("without %s: %v", what, err)
			}
		}
		if r.ID != "n" || mem.OpenFiles() != 0 {
			t.Errorf("without %s: %d files are open, and Inspect says %v", what, mem.OpenFiles(), r)
		}
	}
}

// longLog makes a directory whose log has entries 1 to 30 in several segments.
func longLog(t *testing.T, mem *vfs.Mem) (d *diskStorage, save func(Save)) {
	t.Helper()
	d = memoryDir(mem)
	mustOpen2(t, d)
	lsn := LSN(0)
	save = func(s Save) {
		lsn++
		s.LSN = lsn
		d.Append(s)
		if _, err := d.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	for i := Index(1); i <= 30; i++ {
		save(Save{Entries: []Entries{run(i, 1, 1, 10_000)}})
	}
	return d, save
}

// What is said once, boots and the directory's history, survives the release of
// the segments in which it was said.
func TestCarriedRecords(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	d, save := longLog(t, mem)
	history, err := encodeHistory([]HistoryRecord{{What: HistoryRecovery, Node: "n"}})
	if err != nil {
		t.Fatal(err)
	}
	d.log.Append(wal.Record{Kind: recordHistory, Data: history})
	save(Save{HardState: &HardState{Term: 3, VotedFor: 2}})
	for i := Index(31); i <= 60; i++ {
		save(Save{Entries: []Entries{run(i, 1, 1, 10_000)}})
	}
	save(Save{Start: &EntryID{59, 1}})
	if err := errors.Join(d.log.Prepare(), d.Close()); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1, 4, 6} {
		if isThere(mem, fmt.Sprintf("node/wal/%016x.wal", n)) {
			t.Fatalf("segment %d is still there", n)
		}
	}
	rec := mustOpen2(t, memoryDir(mem))
	if rec.Boot != 2 || len(rec.History) != 1 || rec.HardState != (HardState{Term: 3, VotedFor: 2}) {
		t.Errorf("recovered boot %d, history %v, %+v", rec.Boot, rec.History, rec.HardState)
	}
}

// Segments are released only when it is durable where the log starts: while that
// is being written, power is cut.
func TestReleaseAfterFlush(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	d, save := longLog(t, mem)
	cuts := 0
	mem.SetHook(func(op vfs.Op) error {
		if cuts++; cuts > 1 || op.Kind != vfs.OpWrite {
			return nil
		}
		if err := d.log.Prepare(); err != nil { // as its goroutine may do at any time
			t.Error(err)
		}
		cut := memoryDir(mem.CrashClone(func(int) int { return 0 }))
		if rec := mustOpen2(t, cut); rec.Last != 30 || rec.Start.Index != 0 {
			t.Errorf("recovered %v to %d", rec.Start, rec.Last)
		}
		return nil
	})
	save(Save{Start: &EntryID{25, 1}})
	mem.SetHook(nil)
	if err := errors.Join(d.log.Prepare(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if cuts == 0 || isThere(mem, fmt.Sprintf("node/wal/%016x.wal", 1)) {
		t.Errorf("%d cuts, or the first segment is still there", cuts)
	}
}

// Old segments that are gone though nothing says that the log starts later are
// damage.
func TestOldestSegmentMissing(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	d, _ := longLog(t, mem)
	if err := errors.Join(d.Close(), mem.Remove(fmt.Sprintf("node/wal/%016x.wal", 1))); err != nil {
		t.Fatal(err)
	}
	var corrupt *CorruptError
	if _, err := memoryDir(mem).Open(t.Context(), Identity{"c", "n"}); !errors.As(err, &corrupt) || !strings.Contains(corrupt.Found, "without a record of where it starts") {
		t.Fatal(err)
	}
}

// A snapshot that would replace the log, and is damaged or another one's under
// its name, does not: the log stays.
func TestLogStaysBesideBadSnapshot(t *testing.T) {
	for what, spoil := range map[string]func(mem *vfs.Mem, name string) error{
		"damaged": func(mem *vfs.Mem, name string) error { return mem.FlipBit(name, snapStateOffset(t, mem, name), 0) },
		"renamed": func(mem *vfs.Mem, name string) error { return mem.Rename(name, "node/snap/x.snap") },
	} {
		mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
		oldDirectory(t, mem, false) // its log begins after entry 4
		d := memoryDir(mem)
		meta := mustOpen2(t, d).Snapshots[0]
		meta.ID, meta.Last = [16]byte{7}, EntryID{40, 5}
		storeSnapshot(t, d, meta, "state")
		if err := errors.Join(d.Close(), spoil(mem, "node/snap/"+snapshotName(&meta)+".snap")); err != nil {
			t.Fatal(err)
		}
		d = memoryDir(mem)
		if rec := mustOpen2(t, d); len(rec.Snapshots) != 1 || rec.replacement() != nil || rec.Last != 12 {
			t.Errorf("%s: recovered to %d, with %d snapshots", what, rec.Last, len(rec.Snapshots))
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}
