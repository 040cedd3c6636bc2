package raft

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/raft/internal/snap"
	"example.com/raft/internal/vfs"
)

// snapshotUpTo is the header of a snapshot that ends at an entry.
func snapshotUpTo(i Index, term Term, id byte) SnapshotMeta {
	conf := configuration{members: []member{{id: 1, name: "a"}, {id: memberID(id), name: "b"}}}
	return SnapshotMeta{ID: [16]byte{id}, Last: EntryID{i, term}, Time: time.Unix(int64(i), 0).UTC(), ConfigIndex: 1, Config: conf.encode()}
}

func storeSnapshot(t *testing.T, s Storage, meta SnapshotMeta, text string) {
	t.Helper()
	w, err := s.CreateSnapshot(meta)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{text[:len(text)/2], text[len(text)/2:]} {
		if n, err := io.WriteString(w, part); err != nil || n != len(part) {
			t.Fatalf("wrote %d of %d bytes: %v", n, len(part), err)
		}
		if err := w.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if w.Size() != int64(len(text)) {
		t.Fatalf("size is %d after %d bytes", w.Size(), len(text))
	}
	if err := errors.Join(w.Commit(), w.Abort()); err != nil {
		t.Fatal(err)
	}
}

func checkSnapshot(t *testing.T, s Storage, want SnapshotMeta, text string) {
	t.Helper()
	meta, r, err := s.OpenSnapshot(want.Last)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	if err != nil || string(got) != text || !sameMeta(meta, want) {
		t.Fatalf("snapshot %+v with %d bytes (%v), want %+v with %d", meta, len(got), err, want, len(text))
	}
}

func sameMeta(a, b SnapshotMeta) bool {
	return a.ID == b.ID && a.Last == b.Last && a.Time.Equal(b.Time) && a.ConfigIndex == b.ConfigIndex && bytes.Equal(a.Config, b.Config)
}

// The contract of a Storage's snapshots, for every implementation: what was not
// committed was never there, the two newest stay, and a reader outlives what
// it reads.
func TestStorageSnapshots(t *testing.T) {
	text := func(i Index) string { return strings.Repeat(string(rune('a'+i%26)), 300_000) }
	for name, open := range storages(t) {
		t.Run(name, func(t *testing.T) {
			s := open()
			mustOpen(t, s)
			if _, _, err := s.OpenSnapshot(EntryID{3, 1}); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("OpenSnapshot of an empty storage: %v", err)
			}
			unfinished, err := s.CreateSnapshot(snapshotUpTo(9, 1, 9))
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(unfinished, text(9))
			for i := Index(3); i <= 4; i++ {
				storeSnapshot(t, s, snapshotUpTo(i, 1, byte(i)), text(i))
			}
			_, old, err := s.OpenSnapshot(EntryID{3, 1})
			if err != nil {
				t.Fatal(err)
			}
			for i := Index(7); i >= 5; i -= 2 { // a received one may be older than the own
				storeSnapshot(t, s, snapshotUpTo(i, 2, byte(i)), text(i))
			}
			got, err := io.ReadAll(io.NewSectionReader(old, 0, old.Size()))
			if err != nil || string(got) != text(3) {
				t.Fatalf("a reader of a snapshot that was replaced got %d bytes: %v", len(got), err)
			}
			old.Close()
			if err := unfinished.Abort(); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = open()
			rec := mustOpen(t, s)
			if len(rec.Snapshots) != 2 || !sameMeta(rec.Snapshots[0], snapshotUpTo(7, 2, 7)) || !sameMeta(rec.Snapshots[1], snapshotUpTo(5, 2, 5)) {
				t.Fatalf("recovered %+v", rec.Snapshots)
			}
			checkSnapshot(t, s, rec.Snapshots[0], text(7))
			checkSnapshot(t, s, rec.Snapshots[1], text(5))
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A snapshot is stored even if an older one can't be removed, and that is said:
// whoever took it relies on it from then on, and the next one removes both older
// ones. The simulator found it (seed 1795550856308605284, before the schedule changed).
func TestOldSnapshotThatStays(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	d := memoryDir(mem)
	mustOpen(t, d)
	var kept []error
	d.onKept = func(err error) { kept = append(kept, err) }
	fault := errors.New("no such luck")
	for i := Index(1); i <= 4; i++ {
		removed := false
		mem.SetHook(func(op vfs.Op) error {
			removed = removed || op.Kind == vfs.OpRemove && strings.HasSuffix(op.Name, ".snap")
			if i == 3 && removed && op.Kind == vfs.OpSyncDir {
				return fault
			}
			return nil
		})
		storeSnapshot(t, d, snapshotUpTo(i, 1, byte(i)), "state")
		checkSnapshot(t, d, snapshotUpTo(i, 1, byte(i)), "state")
	}
	mem.SetHook(nil)
	if len(kept) != 1 || !errors.Is(kept[0], fault) {
		t.Errorf("told of %v", kept)
	}
	if names, err := snap.List(mem, d.snapshots.dir); err != nil || len(names) != keptSnapshots {
		t.Errorf("there are %v (%v)", names, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// A snapshot replaces a log that is shorter, and one that is longer and has
// another entry where the snapshot ends. Nothing of that log comes back.
func TestStorageReplacedLog(t *testing.T) {
	for _, longer := range []bool{false, true} {
		for name, open := range storages(t) {
			t.Run(name, func(t *testing.T) {
				n := 5
				if longer {
					n = 50
				}
				s := open()
				mustOpen(t, s)
				before := configuration{members: []member{{id: 1, name: "a"}}}
				s.Append(Save{LSN: 1, HardState: &HardState{Term: 2}, Entries: []Entries{
					makeEntry(entryConfiguration, EntryID{1, 0}, time.Time{}, before.encode()), run(2, n, 1, 100)}})
				last := Index(n + 1)
				s.Append(Save{LSN: 2, Entries: []Entries{makeEntry(entryConfiguration, EntryID{last + 1, 1}, time.Unix(1, 0), before.encode())}})
				mustFlush(t, s, 2)
				meta := snapshotUpTo(20, 2, 7)
				storeSnapshot(t, s, meta, "state")
				s.Append(Save{LSN: 3, Start: &meta.Last, Snapshot: &meta})
				s.Append(Save{LSN: 4, Entries: []Entries{run(21, 3, 2, 100)}})
				mustFlush(t, s, 4)
				check := func() {
					t.Helper()
					checkEntries(t, s, 21, 23, func(Index) Term { return 2 })
					for _, i := range []Index{5, 20, 24} {
						if es, err := s.Read(i, i, 1000); err == nil {
							t.Fatalf("entry %d is still there: %v", i, es)
						}
					}
				}
				check()
				for range 2 {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
					s = open()
					rec := mustOpen(t, s)
					if rec.Start != meta.Last || rec.Last != 23 || rec.ConfigIndex != 1 || !bytes.Equal(rec.Config, meta.Config) || len(rec.older) != 0 {
						t.Fatalf("recovered %+v", rec)
					}
					check()
				}
				s.Close()
			})
		}
	}
}

// damageSnapshot flips a byte of a snapshot file of a crashed node, in the
// payload or near the end, or, with a negative number, cuts bytes off its end.
func damageSnapshot(t *testing.T, h *Harness, i int, which int, fromEnd int64) {
	t.Helper()
	disk := h.node(i).disk.mem
	names, err := snap.List(disk, "data/snap")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	f, err := disk.Open("data/snap/" + names[which] + ".snap")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	if fromEnd < 0 {
		if err := f.Truncate(size + fromEnd); err != nil {
			t.Fatal(err)
		}
		return
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, size-fromEnd); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, size-fromEnd); err != nil {
		t.Fatal(err)
	}
}

// A damaged snapshot is never restored. The one before it is, if the log goes
// on from there; otherwise the node refuses to start and says what to do.
func TestDamagedSnapshot(t *testing.T) {
	for name, c := range map[string]struct {
		keep    int   // KeepLogBytes
		fromEnd int64 // where the newest is damaged
		both    bool
		starts  bool
	}{
		"state, log goes back":      {1 << 20, 40, false, true},
		"end, log goes back":        {1 << 20, 1, false, true},
		"state, log does not":       {1, 40, false, false},
		"end, log does not":         {1, 1, false, false},
		"truncated, log goes back":  {1 << 20, -10, false, true},
		"truncated, log does not":   {1, -10, false, false},
		"both states, log complete": {1 << 20, 40, true, true},
		"both ends, log complete":   {1 << 20, 1, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			snapshots(t, 1, func(t *testing.T, h *Harness) {
				for _, what := range []string{"a", "b", "c"} {
					proposeN(t, h, what, 5)
					h.TakeSnapshot(0)
				}
				proposeN(t, h, "d", 3)
				want := readJournal(h, 0)
				h.CrashPeer(0)
				damageSnapshot(t, h, 0, 1, c.fromEnd)
				if c.both {
					damageSnapshot(t, h, 0, 0, c.fromEnd)
				}
				if !c.starts {
					var corrupt *CorruptError
					if err := h.tryStart(0); !errors.As(err, &corrupt) || corrupt.Do == "" {
						t.Fatalf("Start: %v", err)
					}
					return
				}
				h.RestartPeer(0)
				proposeN(t, h, "e", 1)
				if got := readJournal(h, 0); got != want+" e0" {
					t.Fatalf("after the restart it has %q, want %q and e0", got, want)
				}
			}, WithConfig(func(_ int, conf *Config) { conf.KeepLogBytes = c.keep }))
		})
	}
}

// A leader whose newest snapshot is damaged finds out when it sends it, takes
// another one, and sends that; also where nothing was applied since.
func TestDamagedSnapshotIsNotSent(t *testing.T) {
	for _, news := range []int{3, 0} { // commands since the damaged one
		snapshots(t, 3, func(t *testing.T, h *Harness) {
			leader, behind := leaveBehind(t, h)
			damageSnapshot(t, h, leader, 0, 40)
			proposeN(t, h, "b", news)
			h.ReconnectPeer(behind)
			caughtUp(t, h, behind)
			if n := journalOf(h, leader).snapshots.Load(); n != 2 {
				t.Fatalf("the leader took %d snapshots", n)
			}
			h.CrashPeer(leader)
			h.RestartPeer(leader)
			caughtUp(t, h, leader)
		})
	}
}

// A snapshot that a killed process had renamed and not synced is found by the
// next one, which drops the log before it. A power cut must not take it away
// then. (Simulator, TestSimSnapshots, seed 94.)
func TestSnapshotFoundIsDurable(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	open := func() *diskStorage {
		d := newDiskStorage(&Config{Dir: "data", MaxLogMemoryBytes: 1, MaxSegmentBytes: 1 << 20})
		d.fs = mem
		return d
	}
	// A killed process does nothing more, so nothing of it may run on here.
	kill := func(d *diskStorage) {
		mem.SetHook(func(vfs.Op) error { return errors.New("killed") })
		d.Close()
		mem.SetHook(nil)
		mem.Kill()
	}
	s := open()
	mustOpen(t, s)
	w, err := s.CreateSnapshot(snapshotUpTo(5, 1, 1))
	if err != nil {
		t.Fatal(err)
	}
	var renamed atomic.Bool // the log prepares segments meanwhile
	mem.SetHook(func(op vfs.Op) error {
		if op.Kind == vfs.OpRename {
			renamed.Store(true)
		}
		if renamed.Load() && op.Kind == vfs.OpSyncDir {
			return errors.New("killed")
		}
		return nil
	})
	if err := w.Commit(); err == nil || !renamed.Load() {
		t.Fatalf("Commit: %v", err)
	}
	kill(s)
	for _, after := range []string{"kill", "power cut"} {
		s = open()
		rec := mustOpen(t, s)
		kill(s)
		if len(rec.Snapshots) != 1 {
			t.Fatalf("after the %s there are %d snapshots", after, len(rec.Snapshots))
		}
		mem.Crash(func(int) int { return 0 }) // loses all that is not synced
	}
}

// Each snapshot file has a salt of its own, so that its blocks are not taken
// for those of another one.
func TestSnapshotFilesHaveSalts(t *testing.T) {
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	s := newDiskStorage(&Config{Dir: "data", MaxLogMemoryBytes: 1, MaxSegmentBytes: 1 << 20})
	s.fs = mem
	mustOpen(t, s)
	defer s.Close()
	files := map[string]bool{}
	for i := Index(5); i < 8; i++ {
		storeSnapshot(t, s, snapshotUpTo(i, 1, byte(i)), "the same state")
		names, err := snap.List(mem, "data/snap")
		if err != nil {
			t.Fatal(err)
		}
		f, err := mem.Open("data/snap/" + names[len(names)-1] + ".snap")
		if err != nil {
			t.Fatal(err)
		}
		start := make([]byte, 36)
		if _, err := f.ReadAt(start, 0); err != nil {
			t.Fatal(err)
		}
		f.Close()
		files[string(start[16:24])] = true // docs/FORMAT.md, "Snapshots"
	}
	if len(files) != 3 {
		t.Errorf("%d salts in 3 files", len(files))
	}
}
