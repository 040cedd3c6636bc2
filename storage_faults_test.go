package raft

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"example.com/raft/internal/vfs"
	"github.com/fortytw2/leaktest"
)

// The contract of Storage beyond what TestStorageContract asks: concurrent
// calls, calls at the wrong time, and disks that fail or lose their power.

func diskOver(fs vfs.FS, dir string) *diskStorage {
	c := Config{Dir: dir}.withDefaults()
	d := newDiskStorage(&c)
	d.fs = fs
	return d
}

func forStorages(t *testing.T, f func(t *testing.T, reopen func() Storage)) {
	for name, reopen := range storages(t) {
		t.Run(name, func(t *testing.T) {
			defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
			f(t, reopen)
		})
	}
}

// storageUser drives a Storage as a core does, and remembers what it must hold.
type storageUser struct {
	t *testing.T
	Storage
	lsn LSN
}

func open(t *testing.T, s Storage) (*storageUser, Recovered) {
	t.Helper()
	rec, err := s.Open(t.Context(), testIdentity)
	if err != nil {
		t.Fatal(err)
	}
	return &storageUser{t: t, Storage: s}, rec
}

// save appends a save with the next number.
func (u *storageUser) save(s Save) LSN {
	u.lsn++
	s.LSN = u.lsn
	u.Append(s)
	return s.LSN
}

func (u *storageUser) flush() {
	u.t.Helper()
	if lsn, err := u.Flush(); err != nil || lsn != u.lsn {
		u.t.Fatalf("Flush: %d, %v; want %d", lsn, err, u.lsn)
	}
}

func (u *storageUser) close() {
	u.t.Helper()
	if err := u.Close(); err != nil {
		u.t.Fatal(err)
	}
}

// has compares entries 1 to n, all of one term, with what run made of them.
func (u *storageUser) has(n Index) {
	u.t.Helper()
	checkEntries(u.t, u, 1, n, func(Index) Term { return 1 })
}

// Append, Flush and Read at once: a flush covers what was appended before it,
// and a reader sees entries once they are durable.
func TestStorageConcurrency(t *testing.T) {
	forStorages(t, func(t *testing.T, reopen func() Storage) {
		u, _ := open(t, reopen())
		const saves = 200
		var mu sync.Mutex // what a core's lock is
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					mu.Lock()
					if u.lsn == saves {
						mu.Unlock()
						return
					}
					i := Index(u.lsn) + 1
					lsn := u.save(Save{Entries: []Entries{run(i, 1, 1, 10)}, HardState: &HardState{Term: 1, VotedFor: uint64(i)}})
					mu.Unlock()
					got, err := u.Flush()
					if err != nil || got < lsn {
						t.Errorf("Flush after save %d: %d, %v", lsn, got, err)
						return
					}
					runs, err := u.Read(1+i/2, i, 1<<20)
					if err != nil || runs[0].First() != 1+i/2 || runs[len(runs)-1].Last() != i {
						t.Errorf("Read(%d, %d): %v", 1+i/2, i, err)
						return
					}
				}
			})
		}
		wg.Wait()
		u.close()
		u, rec := open(t, reopen())
		if rec.Last != saves || rec.HardState.VotedFor != saves {
			t.Errorf("recovered %d entries, hard state %v", rec.Last, rec.HardState)
		}
		u.has(Index(saves))
		u.close()
	})
}

// A storage has one user at a time.
func TestStorageInUse(t *testing.T) {
	forStorages(t, func(t *testing.T, reopen func() Storage) {
		u, _ := open(t, reopen())
		if _, err := reopen().Open(t.Context(), testIdentity); err == nil {
			t.Error("opened twice at once")
		}
		u.close()
		u, _ = open(t, reopen())
		u.close()
	})
}

// Calls after Close, which no node makes, fail and harm nothing.
func TestStorageAfterClose(t *testing.T) {
	forStorages(t, func(t *testing.T, reopen func() Storage) {
		u, _ := open(t, reopen())
		u.save(Save{Entries: []Entries{run(1, 1, 1, 10)}})
		u.flush()
		u.close()
		u.save(Save{Entries: []Entries{run(2, 1, 1, 10)}})
		if _, err := u.Flush(); err == nil {
			t.Error("Flush after Close")
		}
		u, rec := open(t, reopen())
		if rec.Last != 1 {
			t.Errorf("recovered %d entries, want 1", rec.Last)
		}
		u.close()
	})
}

func TestStorageOpenCancelled(t *testing.T) {
	defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
	fs := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	u, _ := open(t, diskOver(fs, "data"))
	for i := range Index(100) {
		u.save(Save{Entries: []Entries{run(i+1, 1, 1, 10)}})
		u.flush()
	}
	u.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := diskOver(fs, "data").Open(ctx, testIdentity); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with an ended context: %v", err)
	}
	if n := fs.OpenFiles(); n != 0 {
		t.Errorf("%d files are open", n)
	}
	u, rec := open(t, diskOver(fs, "data"))
	if rec.Last != 100 {
		t.Errorf("recovered %d entries", rec.Last)
	}
	u.close()
}

// After a failed write nothing is written any more, and Open decides anew what
// is durable.
func TestStorageDiskFails(t *testing.T) {
	for _, kind := range []vfs.OpKind{vfs.OpWrite, vfs.OpSync} {
		t.Run(kind.String(), func(t *testing.T) {
			defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
			fs := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
			u, _ := open(t, diskOver(fs, "data"))
			u.save(Save{Entries: []Entries{run(1, 3, 1, 10)}})
			u.flush()
			fs.SetHook(func(op vfs.Op) error {
				if op.Kind == kind {
					return errDisk
				}
				return nil
			})
			u.save(Save{Entries: []Entries{run(4, 3, 1, 10)}})
			if _, err := u.Flush(); !errors.Is(err, errDisk) {
				t.Errorf("Flush on a failing disk: %v", err)
			}
			fs.SetHook(nil)
			u.save(Save{Entries: []Entries{run(7, 1, 1, 10)}})
			if _, err := u.Flush(); !errors.Is(err, errDisk) {
				t.Errorf("Flush after a failed one: %v", err)
			}
			u.Close() // says again that the log has failed
			if n := fs.OpenFiles(); n != 0 {
				t.Errorf("%d files are open", n)
			}
			u, rec := open(t, diskOver(fs, "data"))
			if rec.Last != 3 && rec.Last != 6 {
				t.Errorf("recovered %d entries, want 3 or 6", rec.Last)
			}
			u.has(Index(int(rec.Last)))
			u.close()
		})
	}
}

// TestStoragePowerLoss cuts the power at random points of random work. All that
// was flushed is there, and of the rest a prefix.
func TestStoragePowerLoss(t *testing.T) {
	for seed := range uint64(40) {
		dice := rand.New(rand.NewPCG(seed, 7))
		fs := vfs.NewMem(dice)
		model := newStorageModel()
		for range 4 { // starts
			d := diskOver(fs, "data")
			d.options.MaxSegmentBytes, d.options.PrepareInline = 1<<20, true
			u, rec := open(t, d)
			model.recovered(t, seed, u, rec)
			left := 1 + dice.IntN(60) // changes to the disk until the power fails
			fs.SetHook(func(op vfs.Op) error {
				if op.Kind.Changes() && (op.Kind == vfs.OpSync || op.Kind == vfs.OpWrite) {
					if left--; left < 0 {
						return vfs.ErrGone
					}
				}
				return nil
			})
			for range 1 + dice.IntN(50) {
				u.save(model.next(dice))
				if dice.IntN(2) == 0 {
					if _, err := u.Flush(); err != nil {
						break
					}
					model.flushed()
					_ = d.log.Prepare() // the power may fail there as well
				}
			}
			fs.SetHook(nil)
			fs.Crash(dice.IntN)
			u.Close()
		}
	}
}

// storageModel is what a storage must hold, as a list of saves of which all up
// to durable are there for certain.
type storageModel struct {
	states  []modelState
	durable int
}

type modelState struct {
	hard HardState
	log  []Term // of the entries from 1 on
}

func newStorageModel() *storageModel { return &storageModel{states: []modelState{{}}} }

// next makes a save and the state that it leads to.
func (m *storageModel) next(dice *rand.Rand) Save {
	last := m.states[len(m.states)-1]
	state := modelState{last.hard, slices.Clone(last.log)}
	var s Save
	if dice.IntN(3) == 0 {
		state.hard = HardState{last.hard.Term + 1, uint64(dice.IntN(5)), last.hard.LeasePromise + time.Duration(dice.IntN(2))}
		s.HardState = &state.hard
	}
	term := max(state.hard.Term, 1)
	first := Index(len(state.log) + 1)
	if dice.IntN(4) == 0 && len(state.log) > 0 {
		first = Index(1 + dice.IntN(len(state.log)))
	}
	n := 1 + dice.IntN(5)
	state.log = state.log[:first-1]
	for range n {
		state.log = append(state.log, term)
	}
	s.Entries = []Entries{run(first, n, term, 10)}
	m.states = append(m.states, state)
	return s
}

func (m *storageModel) flushed() { m.durable = len(m.states) - 1 }

// recovered finds out which of the possible states the storage is in, between
// saves or within the newest: hard state and entries are separate records.
func (m *storageModel) recovered(t *testing.T, seed uint64, u *storageUser, rec Recovered) {
	t.Helper()
	log := make([]Term, 0, rec.Last)
	for i := range rec.Last {
		runs, err := u.Read(i+1, i+1, 1)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		log = append(log, runs[0].term(0))
	}
	for k := len(m.states) - 1; k >= m.durable; k-- {
		s := m.states[k]
		whole := s.hard == rec.HardState && slices.Equal(s.log, log)
		hardOnly := k > m.durable && s.hard == rec.HardState && slices.Equal(m.states[k-1].log, log)
		if whole || hardOnly {
			m.states, m.durable = []modelState{{rec.HardState, log}}, 0
			return
		}
	}
	t.Fatalf("seed %d: recovered %v and %d entries, which no save since the last flush led to", seed, rec.HardState, rec.Last)
}
