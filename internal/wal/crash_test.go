package wal

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	"example.com/raft/internal/vfs"
)

var (
	sweep     = flag.Bool("wal.sweep", false, "try many more crashes and every bit of damage")
	crashSeed = flag.Uint64("wal.seed", 1, "seed of the crash tests")
)

// model knows what a log may hold: which records were appended, acknowledged
// and released.
type model struct {
	o        Options
	sizes    []int // of each record appended so far
	lsns     []LSN
	acked    int            // how many records are acknowledged
	released int            // records below this number may be gone
	made     map[int]Record // what record made last, shared by clones
}

func (m *model) record(n int) Record {
	r, ok := m.made[n]
	if !ok || len(r.Data) != m.sizes[n] {
		r = numbered(n, m.sizes[n])
		if m.made == nil {
			m.made = map[int]Record{}
		}
		m.made[n] = r
	}
	if n%7 == 3 {
		r.Kind = kindState
	}
	return r
}

func (m *model) append(l *Log, size int) {
	n := len(m.sizes)
	m.sizes = append(m.sizes, max(8, size))
	m.lsns = append(m.lsns, l.Append(m.record(n)))
}

func (m *model) flush(l *Log) error {
	n := len(m.sizes)
	err := l.Flush()
	if err == nil {
		m.acked = n
	}
	return err
}

// check says what is illegal about the records of a replay, or returns how
// many records the log has held.
func (m *model) check(k *kept) (count int, err error) {
	i := 0
	for i < len(k.lsns) && k.lsns[i] == 0 {
		i++
	}
	carried, recs := k.recs[:i], k.recs[i:]
	first := len(m.sizes)
	if len(recs) > 0 {
		first = number(recs[0])
	}
	count = first + len(recs)
	if len(recs) == 0 {
		count = 0
	}
	switch {
	case first > m.released && len(recs) > 0:
		return 0, fmt.Errorf("the log begins with record %d, and only those below %d were released", first, m.released)
	case count < m.acked:
		return 0, fmt.Errorf("%d records, and %d were acknowledged", count, m.acked)
	case count > len(m.sizes):
		return 0, fmt.Errorf("%d records, and only %d were appended", count, len(m.sizes))
	}
	for j, r := range recs {
		want := m.record(first + j)
		if r.Kind != want.Kind || r.Group != want.Group || string(r.Data) != string(want.Data) {
			return 0, fmt.Errorf("record %d is not what was appended", first+j)
		}
		if j > 0 && k.lsns[i+j] <= k.lsns[i+j-1] {
			return 0, fmt.Errorf("LSN %d after %d", k.lsns[i+j], k.lsns[i+j-1])
		}
	}
	return count, m.checkCarried(carried, first, len(recs) > 0)
}

func (m *model) checkCarried(carried []Record, first int, any bool) error {
	latest := map[uint32]int{}
	for n := range m.sizes[:min(first, len(m.sizes))] {
		if r := m.record(n); any && r.Kind == kindState {
			latest[r.Group] = n
		}
	}
	if len(carried) != len(latest) {
		return fmt.Errorf("%d records are carried, should be %d", len(carried), len(latest))
	}
	for _, r := range carried {
		if n, ok := latest[r.Group]; !ok || n != number(r) {
			return fmt.Errorf("record %d is carried for group %d, should be %d", number(r), r.Group, n)
		}
	}
	return nil
}

// open opens the log on a file system and checks what it holds.
func (m *model) open(fs *vfs.Mem) (l *Log, count int, err error) {
	o := m.o
	o.FS, o.Begun = fs, m.acked > 0
	k := &kept{}
	same := inspected(o)
	l, err = Open(context.Background(), o, k.replay)
	if err := same(k, err); err != nil {
		return nil, 0, err
	}
	if err != nil {
		return nil, 0, err
	}
	count, err = m.check(k)
	return l, count, err
}

func (m *model) clone() *model {
	c := *m
	c.sizes, c.lsns = append([]int(nil), m.sizes...), append([]LSN(nil), m.lsns...)
	return &c
}

// truncate forgets the records that did not survive, and acknowledges the
// others, because Open does.
func (m *model) truncate(count int) {
	m.sizes, m.lsns, m.acked = m.sizes[:count], make([]LSN, count), count
}

// workload drives a log with rollovers, releases, recycling and seals. It
// stops at the first error.
func (m *model) workload(l *Log, steps int, rng *rand.Rand) error {
	for range steps {
		for range rng.IntN(4) {
			size := 20 + rng.IntN(300)
			if rng.IntN(6) == 0 {
				size = rng.IntN(9000)
			}
			m.append(l, size)
		}
		if err := m.flush(l); err != nil {
			return err
		}
		switch rng.IntN(5) {
		case 0:
			if err := l.Seal(); err != nil {
				return err
			}
		case 1:
			if back := len(m.lsns) - 1 - rng.IntN(10); back > m.released && m.lsns[back] > 0 {
				m.released = back
				l.Release(m.lsns[back])
			}
		}
		if err := l.Prepare(); err != nil {
			return err
		}
	}
	return nil
}

// none loses everything unsynced, all keeps it.
func none(int) int { return 0 }
func all(int) int  { return 1 }

// script enumerates the outcomes of a function that makes choices.
type script struct {
	choice, limit []int
	at            int
}

func (s *script) choose(n int) int {
	if s.at == len(s.choice) {
		s.choice, s.limit = append(s.choice, 0), append(s.limit, n)
	}
	s.at++
	return s.choice[s.at-1]
}

// next moves on to the next outcome, or reports that there is none.
func (s *script) next() bool {
	s.at = 0
	for i := len(s.choice) - 1; i >= 0; i-- {
		if s.choice[i]++; s.choice[i] < s.limit[i] {
			s.choice, s.limit = s.choice[:i+1], s.limit[:i+1]
			return true
		}
	}
	return false
}

// crashes calls f with a choice of what a power cut may leave of fs: every one
// if at most four sectors are in doubt, and samples otherwise.
func crashes(fs *vfs.Mem, rng *rand.Rand, samples int, f func(*vfs.Mem)) {
	decisions, product := 0, 1
	fs.CrashClone(func(n int) int {
		decisions++
		product = min(product*n, 1<<20)
		return n - 1
	})
	if product <= 256 {
		s := &script{}
		for {
			f(fs.CrashClone(s.choose))
			if !s.next() {
				return
			}
		}
	}
	f(fs.CrashClone(none))
	f(fs.CrashClone(all))
	f(fs.CrashClone(func(n int) int { return n / 2 })) // every sector garbage
	for range samples {
		// Uniform choices hardly ever keep a whole batch, so some samples keep
		// or lose nearly everything.
		bias, most := rng.IntN(3), rng.IntN(2)
		f(fs.CrashClone(func(n int) int {
			if bias > 0 && rng.IntN(decisions+1) > bias {
				return most
			}
			return rng.IntN(n)
		}))
	}
}

// TestCrashPoints cuts the power before every operation of a workload that can
// change the disk, and again before every one of the recovery.
func TestCrashPoints(t *testing.T) {
	seeds, samples := 2, 3
	if *sweep {
		seeds, samples = 20, 12
	}
	for i := range seeds {
		seed := *crashSeed + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			fs := newMem(seed)
			m := &model{o: testOptions(fs, seed)}
			points, tried, again := 0, 0, 0
			explore := func(op vfs.Op) error {
				if !op.Kind.Changes() {
					return nil
				}
				points++
				crashes(fs, rng, samples, func(c *vfs.Mem) {
					tried++
					again += m.clone().afterCrash(t, c, rng, tried%6 == 0)
				})
				if t.Failed() {
					t.Fatalf("at operation %d, %+v", points, op)
				}
				return nil
			}
			fs.SetHook(explore)
			l, _ := mustOpen(t, m.o)
			if err := m.workload(l, 30, rng); err != nil {
				t.Fatal(err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d records, %d points, %d crashes, %d crashes of the recovery", len(m.sizes), points, tried, again)
		})
	}
}

// afterCrash opens what a crash left, checks it, goes on with it, and checks
// again. With deep it also crashes and fails the recovery at every operation.
// It returns how many crashes that were.
func (m *model) afterCrash(t *testing.T, c *vfs.Mem, rng *rand.Rand, deep bool) (again int) {
	t.Helper()
	if deep {
		again = m.recoveryCrashes(t, c, rng)
	}
	l, count, err := m.open(c)
	if err != nil {
		t.Errorf("after the crash: %v", err)
		return again
	}
	m.truncate(count)
	// What Open has replayed is durable when it returns.
	if _, _, err := m.open(c.CrashClone(none)); err != nil {
		t.Errorf("after a crash after the recovery: %v", err)
	}
	for range 2 {
		m.append(l, 100)
		m.append(l, rng.IntN(5000))
		if err := m.flush(l); err != nil {
			t.Errorf("flush after the recovery: %v", err)
		}
	}
	if _, _, err := m.open(c.CrashClone(none)); err != nil {
		t.Errorf("after the recovery, a flush and a crash: %v", err)
	}
	return again
}

// recoveryCrashes lets the power or the disk fail at every operation of Open.
func (m *model) recoveryCrashes(t *testing.T, c *vfs.Mem, rng *rand.Rand) (again int) {
	t.Helper()
	base := c.CrashClone(none) // c has nothing unsynced, so this is a copy
	ops := 0
	base.SetHook(func(op vfs.Op) error {
		if !op.Kind.Changes() {
			return nil
		}
		ops++
		crashes(base, rng, 2, func(cc *vfs.Mem) {
			again++
			if _, _, err := m.open(cc); err != nil {
				t.Errorf("after a crash in the recovery at %+v: %v", op, err)
			}
		})
		return nil
	})
	if _, _, err := m.open(base); err != nil {
		t.Errorf("after the crash: %v", err)
	}
	for fail := 1; fail <= ops; fail++ {
		again++
		m.recoveryFails(t, c.CrashClone(none), fail)
	}
	return again
}

var errDisk = errors.New("input/output error")

// recoveryFails lets one operation of Open fail, and opens again without and
// with a power cut.
func (m *model) recoveryFails(t *testing.T, fs *vfs.Mem, fail int) {
	t.Helper()
	hook, _ := failAt(fail)
	fs.SetHook(hook)
	_, count, err := m.open(fs)
	fs.SetHook(nil)
	fs.Kill()
	if err == nil { // a spare could not be removed, and that is all
		m = m.clone()
		m.truncate(count)
	}
	if _, _, err := m.open(fs.CrashClone(none)); err != nil {
		t.Errorf("operation %d of the recovery failed, power cut: %v", fail, err)
	}
	if _, count, err = m.open(fs); err != nil {
		t.Errorf("operation %d of the recovery failed: %v", fail, err)
		return
	}
	m = m.clone()
	m.truncate(count)
	if _, _, err := m.open(fs.CrashClone(none)); err != nil {
		t.Errorf("operation %d of the recovery failed, opened again, power cut: %v", fail, err)
	}
}

// failAt is a hook that fails the n-th operation that changes the disk, and
// whether it has.
func failAt(n int) (hook func(vfs.Op) error, failed *bool) {
	failed = new(bool)
	return func(op vfs.Op) error {
		if op.Kind.Changes() {
			if n--; n == 0 {
				*failed = true
				return errDisk
			}
		}
		return nil
	}, failed
}

// TestDiskFailures lets every operation of a workload fail once (mutants 32
// and 38): the log acknowledges nothing more, and what is opened afterwards,
// from a cache that shows what is not on disk, keeps every promise through a
// power cut.
func TestDiskFailures(t *testing.T) {
	seeds := 2
	if *sweep {
		seeds = 40
	}
	for i := range seeds {
		seed := *crashSeed + uint64(i)
		failures := 0
		for fail := 1; ; fail++ {
			fs := newMem(seed)
			rng := rand.New(rand.NewPCG(seed, 5))
			m := &model{o: testOptions(fs, seed)}
			hook, failed := failAt(fail)
			fs.SetHook(hook)
			l, _, err := m.open(fs)
			if err == nil {
				err = m.workload(l, 30, rng)
			}
			if !*failed {
				break // the workload has fewer operations
			}
			if err == nil {
				t.Fatalf("seed %d: operation %d failed, and nothing reported it", seed, fail)
			}
			failures++
			if !errors.Is(err, errDisk) {
				t.Fatalf("seed %d, operation %d: the error does not match its cause: %v", seed, fail, err)
			}
			if l != nil {
				checkFailed(t, l, m)
			}
			fs.SetHook(nil)
			for variant := range 4 {
				m.clone().afterFailure(t, fs, rng, variant)
				if t.Failed() {
					t.Fatalf("seed %d, operation %d failed, variant %d", seed, fail, variant)
				}
			}
		}
		if t.Logf("seed %d: %d failures", seed, failures); failures < 50 {
			t.Errorf("seed %d: only %d operations could fail", seed, failures)
		}
	}
}

// checkFailed checks that a log on which Flush failed stays so.
func checkFailed(t *testing.T, l *Log, m *model) {
	t.Helper()
	first := l.Err()
	if first == nil { // preparing ahead failed; that is no failure of the log
		return
	}
	durable := l.Durable()
	lsn := l.Append(numbered(0, 10))
	for range 2 {
		if err := l.Flush(); !errors.Is(err, ErrFailed) || !errors.Is(err, errDisk) || err.Error() != first.Error() {
			t.Fatalf("Flush after a failure: %v, want %v", err, first)
		}
	}
	if err := l.Seal(); !errors.Is(err, ErrFailed) {
		t.Fatalf("Seal after a failure: %v", err)
	}
	if l.Durable() != durable || lsn <= durable {
		t.Fatal("something became durable after a failure")
	}
	if n := m.acked - 1; n >= m.released && n >= 0 {
		if _, err := l.ReadAt(m.lsns[n], nil); err != nil {
			t.Fatalf("reading what is durable after a failure: %v", err)
		}
	}
	if err := l.Close(); !errors.Is(err, ErrFailed) {
		t.Fatalf("Close after a failure: %v", err)
	}
}

// afterFailure restarts the process, with variant 1 and 3 on a cold cache,
// goes on, and cuts the power, with variants 2 and 3 twice.
func (m *model) afterFailure(t *testing.T, orig *vfs.Mem, rng *rand.Rand, variant int) {
	t.Helper()
	fs := orig.Clone()
	if variant%2 == 1 {
		fs.DropCaches()
	}
	l, count, err := m.open(fs)
	if err != nil {
		t.Errorf("opening after the failure: %v", err)
		return
	}
	m.truncate(count)
	if variant >= 2 {
		crashes(fs, rng, 4, func(c *vfs.Mem) {
			if _, _, err := m.open(c); err != nil {
				t.Errorf("opening after the failure, recovery and a power cut: %v", err)
			}
		})
	}
	if err := m.workload(l, 4, rng); err != nil {
		t.Errorf("going on after the failure: %v", err)
		return
	}
	fs.DropCaches()
	crashes(fs, rng, 4, func(c *vfs.Mem) {
		if _, _, err := m.open(c); err != nil {
			t.Errorf("opening after the failure, more writes and a power cut: %v", err)
		}
	})
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 11)) }
