package wal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/vfs"
)

// fill appends and flushes records of the given size while there is room.
func (m *model) fill(t *testing.T, l *Log, size int) (n int) {
	t.Helper()
	for {
		if room, _ := l.Room(); room < int64(size+recordHeadSize) {
			return n
		}
		m.append(l, size)
		if err := m.flush(l); err != nil {
			t.Fatalf("there was room, and after %d records Flush fails: %v", n, err)
		}
		n++
		_ = l.Prepare()
	}
}

// state appends one of the small records that are written without asking.
func (m *model) state(l *Log) {
	for len(m.sizes)%7 != 3 {
		m.append(l, 8)
	}
	m.append(l, 16)
}

// TestDiskFull: on a full disk the log fails nothing. What there is room for is
// written, then small records, in the slack and the reserve; then Flush says
// that the disk is full, as often as it is called, and keeps what was appended.
// With space again it goes on.
func TestDiskFull(t *testing.T) {
	fs := newMem(1)
	m := &model{o: testOptions(fs, 1)}
	m.o.MinSegmentBytes, m.o.MaxSegmentBytes, m.o.ReserveBytes = 16*blockSize, 32*blockSize, 12*blockSize
	l, _ := mustOpen(t, m.o)
	if err := l.Prepare(); err != nil {
		t.Fatal(err)
	}
	fs.SetCapacity(fs.Used() + 2*blockSize)
	if n := m.fill(t, l, 3000); n < 5 {
		t.Fatalf("only %d records found room in a segment of 16 blocks", n)
	}
	if err := l.Prepare(); !errors.Is(err, ErrDiskFull) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("Prepare on a full disk: %v", err)
	}
	if _, full := l.Room(); !errors.Is(full, ErrDiskFull) || !errors.Is(l.Claim(3000), ErrDiskFull) {
		t.Fatalf("Room on a full disk says %v", full)
	}
	flushes := 0
	var err error
	for ; err == nil; flushes++ {
		m.state(l)
		err = m.flush(l)
	}
	if want := slackBlocks + (12 - 3) - 1; flushes < want || errors.Is(err, ErrFailed) || !errors.Is(err, ErrDiskFull) {
		t.Fatalf("after %d small flushes, want %d: %v", flushes, want, err)
	}
	m.append(l, 100)
	for range 3 {
		if err := l.Flush(); !errors.Is(err, ErrDiskFull) || errors.Is(err, ErrFailed) || l.Err() != nil {
			t.Fatalf("Flush on a full disk, again: %v", err)
		}
	}
	checkRead(t, l, m.lsns[len(m.lsns)-1], len(m.lsns)-1) // still staged
	if used, capacity := fs.Used(), fs.Used()+blockSize; used < capacity-3*blockSize {
		t.Fatalf("%d bytes used: something was left half-made", used)
	}
	names, _ := fs.List(m.o.Dir)
	if slices.ContainsFunc(names, func(n string) bool { _, spare := parseName(n, spareSuffix); return spare }) {
		t.Fatalf("files left: %v", names)
	}
	fs.SetCapacity(0)
	if err := l.Prepare(); err != nil {
		t.Fatal(err)
	}
	if _, full := l.Room(); full != nil {
		t.Fatalf("with space again: %v", full)
	}
	if err := m.flush(l); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if n := fs.OpenFiles(); n != 0 {
		t.Fatalf("%d files are open", n)
	}
	if _, count, err := m.open(fs.CrashClone(none)); err != nil || count != len(m.sizes) {
		t.Fatalf("%d of %d records: %v", count, len(m.sizes), err)
	}
}

// TestFullDirectory: on some file systems a rename needs space too. One that finds
// none has changed nothing, so it is like a lack of space for the file.
func TestFullDirectory(t *testing.T) {
	for _, reserve := range []int{-1, 0} {
		fs := newMem(1)
		m := &model{o: testOptions(fs, 1)}
		m.o.ReserveBytes = reserve
		l, _ := mustOpen(t, m.o)
		if reserve < 0 {
			l.Want(1 << 20)
		}
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpRename {
				return syscall.ENOSPC
			}
			return nil
		})
		m.append(l, 3000)
		for range 3 {
			_ = l.Prepare()
			if _, full := l.Room(); !errors.Is(full, ErrDiskFull) {
				t.Fatalf("reserve %d: Room says %v", reserve, full)
			}
		}
		names, _ := fs.List(m.o.Dir)
		if slices.ContainsFunc(names, func(n string) bool { _, spare := parseName(n, spareSuffix); return spare }) {
			t.Fatalf("reserve %d: files left: %v", reserve, names)
		}
		fs.SetHook(nil)
		if err := l.Prepare(); err != nil {
			t.Fatalf("reserve %d: with space again: %v", reserve, err)
		}
		if err := m.flush(l); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if n := fs.OpenFiles(); n != 0 {
			t.Fatalf("%d files are open", n)
		}
	}
}

// TestFullRestart: a process that was killed on a full disk starts again there,
// although its last batch must be copied to another segment: that is what the
// reserve is for.
func TestFullRestart(t *testing.T) {
	for _, reserve := range []int{0, -1} {
		fs := newMem(1)
		m := &model{o: testOptions(fs, 1)}
		m.o.ReserveBytes = reserve
		l, _ := mustOpen(t, m.o)
		if err := l.Prepare(); err != nil {
			t.Fatal(err)
		}
		m.append(l, 100)
		if err := m.flush(l); err != nil {
			t.Fatal(err)
		}
		fs.SetCapacity(fs.Used())
		fs.Kill()
		l, count, err := m.open(fs)
		if reserve < 0 {
			if !errors.Is(err, ErrDiskFull) {
				t.Fatalf("without a reserve: %v", err)
			}
			fs.SetCapacity(0)
			if _, count, err = m.open(fs); err != nil || count != 1 {
				t.Fatalf("with space again: %d records, %v", count, err)
			}
			continue
		}
		if err != nil || count != 1 {
			t.Fatalf("%d records, %v", count, err)
		}
		if _, full := l.Room(); !errors.Is(full, ErrDiskFull) {
			t.Fatalf("the reserve is in use, and the log says %v", full)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRoom: whatever is appended within Room finds space on a full disk, also
// when flushes and seals come between, and while a batch is being written. A few
// small records more find some, too: in half of the seeds.
func TestRoom(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 17))
		fs := newMem(seed)
		m := &model{o: testOptions(fs, seed)}
		m.o.MinSegmentBytes = blockSize * (8 + rng.IntN(10))
		m.o.MaxSegmentBytes = m.o.MinSegmentBytes * 4
		l, _ := mustOpen(t, m.o)
		if rng.IntN(3) > 0 {
			l.Want(int64(rng.IntN(100_000)))
		}
		if err := l.Prepare(); err != nil {
			t.Fatal(err)
		}
		fs.SetCapacity(fs.Used())
		small := 0
		step := func(of int) {
			room, _ := l.Room()
			if n := int(room) - recordHeadSize; n >= 8 {
				m.append(l, 8+rng.IntN(max(1, n*of/8-7)))
			}
			if seed%2 == 1 && rng.IntN(4) == 0 && small < 3 {
				small++
				l.Append(Record{Kind: kindState, Data: make([]byte, 16)})
			}
		}
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpWrite && rng.IntN(2) == 0 {
				step(1) // while a batch is being written
			}
			return nil
		})
		for range 40 {
			for range rng.IntN(3) {
				step(1 + rng.IntN(8))
			}
			if err := l.Flush(); err != nil {
				t.Fatalf("seed %d: all was within Room: %v", seed, err)
			}
			if rng.IntN(5) == 0 {
				if err := l.Seal(); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
		}
		if _, full := l.Room(); full != nil && small == 0 {
			t.Fatalf("seed %d: a flush needed a segment that there was no space for: %v", seed, full)
		}
	}
}

// TestWant: a segment is made large enough for what somebody waits to append.
func TestWant(t *testing.T) {
	fs := newMem(1)
	m := &model{o: testOptions(fs, 1)}
	l, _ := mustOpen(t, m.o)
	for _, n := range []int64{100, 50_000, 200_000, 20_000} {
		if err := l.Claim(n); err != nil {
			t.Fatal(err)
		}
		if room, _ := l.Room(); room < n {
			t.Fatalf("room for %d bytes, and %d were claimed", room, n)
		}
		m.append(l, int(n)-recordHeadSize)
		creates := 0
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpCreate {
				creates++
			}
			return nil
		})
		if err := m.flush(l); err != nil || creates > 0 {
			t.Fatalf("Flush of what was claimed made %d files: %v", creates, err)
		}
		fs.SetHook(nil)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.open(fs); err != nil {
		t.Fatal(err)
	}
}

// TestFullRetries: while the disk is full preparing is tried again, ever less
// often, and OnSpace tells when there is space again.
func TestFullRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMem(1)
		o := testOptions(fs, 1)
		o.PrepareInline = false
		var changes []string
		started := time.Now()
		var l *Log
		changed := make(chan struct{}, 100)
		o.OnSpace = func() { changed <- struct{}{} }
		l, _ = mustOpen(t, o)
		synctest.Wait()
		note := func() {
			for len(changed) > 0 {
				<-changed
			}
			_, full := l.Room()
			changes = append(changes, fmt.Sprintf("%v: full %v", time.Since(started).Round(10*time.Millisecond), full != nil))
		}
		var creates atomic.Int32
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpCreate {
				creates.Add(1)
			}
			return nil
		})
		fs.SetCapacity(fs.Used() + 1)
		if err := l.Claim(100_000); !errors.Is(err, ErrDiskFull) {
			t.Fatalf("Claim on a full disk: %v", err)
		}
		note()
		waiting := make(chan error)
		go func() { waiting <- l.Flush() }()
		if err := <-waiting; err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if n, most := creates.Load(), int32(2*60*10+20); n > most {
			t.Fatalf("%d files were begun in 10 minutes, want at most %d", n, most)
		}
		fs.SetCapacity(0)
		<-changed
		if d := time.Since(started); d > 10*time.Minute+lastRetry {
			t.Fatalf("space was noticed after %v", d)
		}
		note()
		if err := l.Claim(100_000); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if len(changes) != 2 || changes[0] != "0s: full true" {
			t.Fatalf("%v", changes)
		}
		t.Log(changes, creates.Load(), "files begun")
	})
}

// TestFullCrashPoints fills the disk at random moments of a workload and frees
// it again, and cuts the power before every operation: every state opens to
// what was acknowledged, also while the disk is full.
func TestFullCrashPoints(t *testing.T) {
	seeds, samples := 3, 2
	if *sweep {
		seeds, samples = 30, 8
	}
	for i := range seeds {
		seed := *crashSeed + uint64(i)
		rng := rand.New(rand.NewPCG(seed, 23))
		fs := newMem(seed)
		m := &model{o: testOptions(fs, seed)}
		points, tried, full, stillFull := 0, 0, 0, 0
		fs.SetHook(func(op vfs.Op) error {
			if !op.Kind.Changes() {
				return nil
			}
			points++
			crashes(fs, rng, samples, func(c *vfs.Mem) {
				tried++
				onFull := c.CrashClone(none)
				onFull.SetCapacity(onFull.Used())
				if _, _, err := m.open(onFull); err != nil && !errors.Is(err, ErrDiskFull) {
					t.Errorf("operation %d, %+v: opening on a full disk: %v", points, op, err)
				} else if err != nil {
					stillFull++
					onFull.SetCapacity(0)
					if _, _, err := m.open(onFull); err != nil {
						t.Errorf("operation %d, %+v: opening with space again: %v", points, op, err)
					}
				}
				m.clone().afterCrash(t, c, rng, tried%12 == 0)
			})
			return nil
		})
		l, _ := mustOpen(t, m.o)
		for range 12 {
			fs.SetCapacity(0)
			if rng.IntN(3) > 0 {
				fs.SetCapacity(fs.Used() + int64(rng.IntN(12*blockSize)))
			}
			if rng.IntN(2) == 0 {
				l.Want(int64(rng.IntN(20 * blockSize)))
			}
			if err := m.workload(l, 1+rng.IntN(5), rng); errors.Is(err, ErrFailed) {
				t.Fatalf("seed %d: %v", seed, err)
			} else if errors.Is(err, ErrDiskFull) {
				full++
			} else if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		fs.SetCapacity(0)
		if err := errors.Join(l.Prepare(), m.flush(l), l.Close()); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if full == 0 || t.Failed() {
			t.Fatalf("seed %d: the disk was full %d times", seed, full)
		}
		t.Logf("seed %d: %d records, %d points, %d crashes, full %d times, %d starts had to wait for space", seed, len(m.sizes), points, tried, full, stillFull)
	}
}

// TestNoSpaceAnywhere lets every operation of a workload fail once with ENOSPC.
// Preparing may fail so, and the log goes on; what fails inside of a claimed
// segment ends it. Either way what was acknowledged is there afterwards.
func TestNoSpaceAnywhere(t *testing.T) {
	soft, hard := 0, 0
	for fail := 1; ; fail++ {
		fs := newMem(9)
		rng := rand.New(rand.NewPCG(9, 29))
		m := &model{o: testOptions(fs, 9)}
		n, failed := fail, false
		fs.SetHook(func(op vfs.Op) error {
			if !op.Kind.Changes() {
				return nil
			}
			if n--; n != 0 {
				return nil
			}
			failed = true
			return syscall.ENOSPC
		})
		l, _, err := m.open(fs)
		for err == nil && len(m.sizes) < 60 {
			if err = m.workload(l, 1, rng); errors.Is(err, ErrDiskFull) && !errors.Is(err, ErrFailed) {
				soft++
				err = m.flush(l) // the failure was the only one
			}
		}
		if !failed {
			break
		}
		if err != nil {
			hard++
		}
		fs.SetHook(nil)
		for variant := range 4 {
			m.clone().afterFailure(t, fs, rng, variant)
		}
		if t.Failed() {
			t.Fatalf("operation %d failed: %v", fail, err)
		}
	}
	if soft == 0 || hard == 0 {
		t.Errorf("%d operations failed and the log went on, %d ended it: want both", soft, hard)
	}
	t.Logf("%d operations failed and the log went on, %d ended it", soft, hard)
}

// A sync of the directory that finds no space is final: nobody knows what the
// directory holds, and the next sync may succeed without having written it.
func TestDirectorySyncFull(t *testing.T) {
	fs := newMem(1)
	l, _ := mustOpen(t, testOptions(fs, 1))
	failed := false
	fs.SetHook(func(op vfs.Op) error {
		if op.Kind == vfs.OpSyncDir && !failed {
			failed = true
			return syscall.ENOSPC
		}
		return nil
	})
	for n := 0; !failed; n++ {
		l.Append(numbered(n, 1000))
		_ = l.Flush() // it fails when a segment is to be named
	}
	for range 2 {
		if err := l.Flush(); !errors.Is(err, ErrFailed) || errors.Is(err, ErrDiskFull) || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("Flush: %v", err)
		}
	}
	if err := l.Close(); !errors.Is(err, ErrFailed) {
		t.Fatalf("Close: %v", err)
	}
}
