package raft

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"example.com/raft/internal/vfs"
)

// storages are the implementations of Storage, each as a function that returns
// the same data opened again at each call.
func storages(t *testing.T) map[string]func() Storage {
	memory := NewMemoryStorage()
	disk := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	dir := t.TempDir()
	onDisk := func(fs vfs.FS, dir string) Storage {
		d := newDiskStorage(&Config{Dir: dir, MaxLogMemoryBytes: 1, MaxSegmentBytes: 1 << 20})
		d.fs = fs
		return d
	}
	return map[string]func() Storage{
		"memory":     func() Storage { return memory },
		"disk (mem)": func() Storage { return onDisk(disk, "data") },
		"disk (os)":  func() Storage { return onDisk(vfs.OS(), dir) },
	}
}

var testIdentity = Identity{ClusterID: "test", NodeID: "a"}

// run is a series of entries of one term with payloads of some size.
func run(first Index, n int, term Term, size int) Entries {
	var b entryBuilder
	for i := range n {
		b.add(entryCommand, []byte(fmt.Sprintf("%d/%d:%s", first+Index(i), term, strings.Repeat("x", size))))
	}
	return b.seal(first, term, time.Unix(1, 0))
}

func mustOpen(t *testing.T, s Storage) Recovered {
	t.Helper()
	rec, err := s.Open(context.Background(), testIdentity)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func mustFlush(t *testing.T, s Storage, want LSN) {
	t.Helper()
	if got, err := s.Flush(); err != nil || got != want {
		t.Fatalf("Flush: %d, %v, want %d", got, err, want)
	}
}

// checkEntries reads lo to hi back, in several steps, and compares terms.
func checkEntries(t *testing.T, s Storage, lo, hi Index, term func(Index) Term) {
	t.Helper()
	for i := lo; i <= hi; {
		es, err := s.Read(i, hi, 3000)
		if err != nil || len(es) == 0 || es[0].First() != i {
			t.Fatalf("Read(%d, %d): %v, %v", i, hi, es, err)
		}
		for _, e := range es {
			for k := range e.Len() {
				if want := fmt.Sprintf("%d/%d:", i, term(i)); e.term(k) != term(i) || !strings.HasPrefix(string(e.data(k)), want) {
					t.Fatalf("entry %d has term %d and data %.20q, want %q", i, e.term(k), e.data(k), want)
				}
				i++
			}
		}
	}
}

// The contract of Storage, for every implementation: what was flushed is there
// after reopening, what replaced it is there instead, and a dropped prefix is gone.
func TestStorageContract(t *testing.T) {
	for name, open := range storages(t) {
		t.Run(name, func(t *testing.T) {
			s := open()
			rec := mustOpen(t, s)
			if rec.Last != 0 || rec.Config != nil || rec.HardState != (HardState{}) || rec.Boot != 1 || rec.DirectoryID == [16]byte{} {
				t.Fatalf("a new storage recovers %+v", rec)
			}
			id := rec.DirectoryID
			conf := configuration{members: []member{{id: 1, name: "a"}}}
			s.Append(Save{LSN: 1, HardState: &HardState{Term: 1, VotedFor: 2}, Entries: []Entries{
				makeEntry(entryConfiguration, EntryID{1, 0}, time.Time{}, conf.encode()), run(2, 9, 1, 100)}})
			s.Append(Save{LSN: 2, Entries: []Entries{run(11, 10, 1, 100)}})
			mustFlush(t, s, 2)
			// Entries 15 to 20 are replaced by a later term's, across records.
			s.Append(Save{LSN: 3, HardState: &HardState{Term: 3}, Entries: []Entries{run(15, 20, 3, 100)}})
			mustFlush(t, s, 3)
			mustFlush(t, s, 3) // nothing new
			term := func(i Index) Term {
				if i < 15 {
					return 1
				}
				return 3
			}
			checkEntries(t, s, 2, 34, term)
			if _, err := s.Read(30, 40, 1000); err == nil {
				if es, _ := s.Read(30, 40, 1<<20); len(es) > 0 && es[len(es)-1].Last() > 34 {
					t.Error("Read returned entries beyond the log")
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}

			s = open()
			rec = mustOpen(t, s)
			if rec.HardState != (HardState{Term: 3}) || rec.Last != 34 || rec.Start != (EntryID{}) || rec.Boot != 2 || rec.DirectoryID != id || rec.ConfigIndex != 1 {
				t.Fatalf("recovered %+v", rec)
			}
			if fmt.Sprint(rec.Runs) != fmt.Sprint([]EntryID{{1, 0}, {2, 1}, {15, 3}}) {
				t.Errorf("runs are %v", rec.Runs)
			}
			checkEntries(t, s, 2, 34, term)

			s.Append(Save{LSN: 1, Start: &EntryID{20, 3}})
			mustFlush(t, s, 1)
			if _, err := s.Read(20, 20, 100); err == nil {
				t.Error("entry 20 can be read after the log began after it")
			}
			checkEntries(t, s, 21, 34, term)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open()
			rec = mustOpen(t, s)
			if rec.Start != (EntryID{20, 3}) || rec.Last != 34 || rec.ConfigIndex != 1 || string(rec.Config) != string(conf.encode()) {
				t.Fatalf("recovered %+v", rec)
			}
			checkEntries(t, s, 21, 34, term)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A configuration that was truncated gives way to the one before it, also when
// the truncation comes after a restart (FAULTS 2, mutants 21 and 40).
func TestStorageKeepsConfigurations(t *testing.T) {
	confs := make([][]byte, 4)
	for i := range confs {
		c := configuration{members: []member{{id: memberID(i + 1), name: NodeID(fmt.Sprint(i))}}}
		confs[i] = c.encode()
	}
	for name, open := range storages(t) {
		t.Run(name, func(t *testing.T) {
			s := open()
			mustOpen(t, s)
			s.Append(Save{LSN: 1, Entries: []Entries{makeEntry(entryConfiguration, EntryID{1, 0}, time.Time{}, confs[0])}})
			s.Append(Save{LSN: 2, Entries: []Entries{makeEntry(entryConfiguration, EntryID{2, 1}, time.Time{}, confs[1])}})
			s.Append(Save{LSN: 3, Entries: []Entries{makeEntry(entryConfiguration, EntryID{3, 1}, time.Time{}, confs[2])}})
			mustFlush(t, s, 3)
			s.Close()
			s = open()
			rec := mustOpen(t, s)
			if rec.ConfigIndex != 3 || len(rec.older) != 2 || rec.older[1].index != 2 || string(rec.older[1].data) != string(confs[1]) {
				t.Fatalf("recovered configuration %d and before it %v", rec.ConfigIndex, rec.older)
			}
			s.Append(Save{LSN: 1, Entries: []Entries{run(3, 1, 2, 10)}})
			s.Append(Save{LSN: 2, Start: &EntryID{2, 1}})
			mustFlush(t, s, 2)
			s.Close()
			s = open()
			if rec = mustOpen(t, s); rec.ConfigIndex != 2 || string(rec.Config) != string(confs[1]) || len(rec.older) != 0 {
				t.Errorf("recovered configuration %d and before it %v, want 2 and none", rec.ConfigIndex, rec.older)
			}
			s.Close()
		})
	}
}

// Dropping a prefix gives segments back, and neither hard state nor start is
// lost with them (FAULTS 2, mutant 40).
func TestStorageRecyclesSegments(t *testing.T) {
	for name, open := range storages(t) {
		t.Run(name, func(t *testing.T) {
			s := open()
			mustOpen(t, s)
			s.Append(Save{LSN: 1, HardState: &HardState{Term: 7, VotedFor: 3}})
			lsn, last := LSN(1), Index(0)
			for range 40 { // 40 times 256 KiB, segments of at most 1 MiB
				lsn++
				s.Append(Save{LSN: lsn, Entries: []Entries{run(last+1, 64, 7, 4096)}})
				last += 64
				if last > 256 {
					lsn++
					s.Append(Save{LSN: lsn, Start: &EntryID{last - 128, 7}})
				}
				mustFlush(t, s, lsn)
			}
			if d, ok := s.(*diskStorage); ok {
				d.log.Prepare() // what its goroutine does, which may not have run yet
				if st := d.log.Status(); st.Segments > 8 {
					t.Errorf("%d segments for half a MiB of log", st.Segments)
				}
			}
			s.Close()
			s = open()
			rec := mustOpen(t, s)
			if rec.HardState != (HardState{Term: 7, VotedFor: 3}) || rec.Start != (EntryID{last - 128, 7}) || rec.Last != last {
				t.Errorf("recovered %+v", rec)
			}
			checkEntries(t, s, last-127, last, func(Index) Term { return 7 })
			s.Close()
		})
	}
}

// A copied directory is refused, because two nodes with one identity would
// vote twice, until its operator says that the original is gone.
func TestCopiedDirectoryIsRefused(t *testing.T) {
	original := usedDirectory(t)
	copied := original
	copied.Dir = filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(copied.Dir, os.DirFS(original.Dir)); err != nil {
		t.Fatal(err)
	}
	start := func(c Config) error {
		s, err := Start(t.Context(), c)
		if err != nil {
			return err
		}
		return s.Close()
	}
	before := contents(t, copied.Dir)
	var refused *IdentityError
	if err := start(copied); !errors.As(err, &refused) || !strings.Contains(err.Error(), "AdoptDir") {
		t.Fatalf("got %v", err)
	}
	if fmt.Sprint(contents(t, copied.Dir)) != fmt.Sprint(before) {
		t.Error("the refused copy was changed")
	}
	adopted := copied
	adopted.AdoptDir = true
	if err := start(adopted); err != nil {
		t.Fatalf("adopting: %v", err)
	}
	if err := start(copied); err != nil {
		t.Errorf("after adopting: %v", err)
	}
	if err := start(original); err != nil {
		t.Errorf("the original, after all: %v", err)
	}
}
