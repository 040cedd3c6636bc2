package wal

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"example.com/raft/internal/vfs"
)

const (
	kindData  = 2
	kindState = 1 // carried
)

// testOptions are those of a small, deterministic log.
func testOptions(fs vfs.FS, seed uint64) Options {
	rng := rand.New(rand.NewPCG(seed, 7))
	return Options{
		FS: fs, Dir: "/data/log", Tag: [16]byte{1, 2, 3},
		MinSegmentBytes: 4 * blockSize, MaxSegmentBytes: 8 * blockSize, MaxSpares: 1,
		Carry: []byte{kindState}, Rand: rng.Uint64, PrepareInline: true,
	}
}

func newMem(seed uint64) *vfs.Mem { return vfs.NewMem(rand.New(rand.NewPCG(seed, 1))) }

// kept is what a replay gave.
type kept struct {
	lsns []LSN
	recs []Record
}

func (k *kept) replay(lsn LSN, r Record) error {
	r.Data = append([]byte(nil), r.Data...)
	k.lsns, k.recs = append(k.lsns, lsn), append(k.recs, r)
	return nil
}

func mustOpen(t testing.TB, o Options) (*Log, *kept) {
	t.Helper()
	k := &kept{}
	l, err := Open(context.Background(), o, k.replay)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return l, k
}

// numbered is record n of a workload: its number, then bytes that follow from
// it, so that any mix-up shows.
func numbered(n, size int) Record {
	b := binary.LittleEndian.AppendUint64(nil, uint64(n))
	rng := rand.New(rand.NewPCG(uint64(n), 99))
	for len(b) < size {
		b = binary.LittleEndian.AppendUint64(b, rng.Uint64())
	}
	return Record{Kind: kindData, Group: uint32(n % 3), Data: b[:max(8, size)]}
}

func number(r Record) int { return int(binary.LittleEndian.Uint64(r.Data)) }

// onEach runs a test on the real file system and on the one in memory.
func onEach(t *testing.T, f func(t *testing.T, o Options)) {
	t.Run("os", func(t *testing.T) {
		o := testOptions(vfs.OS(), 1)
		o.Dir = t.TempDir() + "/a/b"
		f(t, o)
	})
	t.Run("mem", func(t *testing.T) {
		m := newMem(1)
		f(t, testOptions(m, 1))
		if n := m.OpenFiles(); n != 0 {
			t.Errorf("%d files are open at the end", n)
		}
	})
}

// TestContract appends, flushes, reads, rolls over, releases, recycles, closes
// and opens again.
//
// More than 70 lines: one life of a log, in order.
func TestContract(t *testing.T) {
	onEach(t, func(t *testing.T, o Options) {
		l, k := mustOpen(t, o)
		if len(k.recs) != 0 {
			t.Fatalf("a new log replays %d records", len(k.recs))
		}
		var lsns []LSN
		for n := range 60 {
			r := numbered(n, 100+n*37%3000)
			half := len(r.Data) / 2
			lsn := l.Append(Record{Kind: r.Kind, Group: r.Group, Data: r.Data[:half], Parts: [][]byte{nil, r.Data[half:]}})
			if len(lsns) > 0 && lsn <= lsns[len(lsns)-1] {
				t.Fatalf("LSN %d after %d", lsn, lsns[len(lsns)-1])
			}
			if lsn <= l.Durable() {
				t.Fatal("a record is durable before Flush")
			}
			checkRead(t, l, lsn, n)
			lsns = append(lsns, lsn)
			if n%3 == 2 {
				if err := l.Flush(); err != nil {
					t.Fatal(err)
				}
				if lsn > l.Durable() {
					t.Fatal("a record is not durable after Flush")
				}
				if l.Staged() != 0 {
					t.Fatalf("%d bytes staged after Flush", l.Staged())
				}
			}
			if err := l.Prepare(); err != nil {
				t.Fatal(err)
			}
		}
		for n, lsn := range lsns {
			checkRead(t, l, lsn, n)
		}
		before := l.Status()
		if before.Segments < 4 {
			t.Fatalf("only %d segments: the workload does not roll over", before.Segments)
		}
		l.Release(lsns[50])
		if err := l.Prepare(); err != nil {
			t.Fatal(err)
		}
		if s := l.Status(); s.Segments >= before.Segments || s.Spares != 1 || s.Oldest > lsns[50] {
			t.Fatalf("after Release: %+v, before: %+v", s, before)
		}
		if _, err := l.ReadAt(lsns[0], nil); !errors.Is(err, ErrReleased) {
			t.Fatalf("reading what was released: %v", err)
		}
		checkRead(t, l, lsns[50], 50)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatalf("second Close: %v", err)
		}
		if err := l.Flush(); !errors.Is(err, ErrClosed) {
			t.Fatalf("Flush after Close: %v", err)
		}
		if _, err := l.ReadAt(lsns[50], nil); !errors.Is(err, ErrClosed) {
			t.Fatalf("ReadAt after Close: %v", err)
		}

		segments := l.Status().Segments
		l, k = mustOpen(t, o)
		first := number(k.recs[0])
		if first > 50 {
			t.Fatalf("record 50 is gone, the first is %d", first)
		}
		for i, r := range k.recs {
			if number(r) != first+i {
				t.Fatalf("record %d where %d should be", number(r), first+i)
			}
			checkRead(t, l, k.lsns[i], first+i)
		}
		if last := first + len(k.recs) - 1; last != 59 {
			t.Fatalf("the last record is %d, should be 59", last)
		}
		if s := l.Status(); s.Segments != segments {
			t.Fatalf("opening a log that was closed makes %d segments of %d", s.Segments, segments)
		}
		lsn := l.Append(numbered(60, 5))
		if err := l.Flush(); err != nil || lsn > l.Durable() {
			t.Fatalf("Flush after reopening: %v", err)
		}
		if _, err := Open(context.Background(), o, k.replay); !errors.Is(err, vfs.ErrLocked) {
			t.Fatalf("a second Open: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func checkRead(t *testing.T, l *Log, lsn LSN, n int) {
	t.Helper()
	for _, buf := range [][]byte{nil, make([]byte, 16), make([]byte, 4096)} {
		r, err := l.ReadAt(lsn, buf)
		if err != nil {
			t.Fatalf("ReadAt(%d): %v", lsn, err)
		}
		want := numbered(n, len(r.Data))
		if string(r.Data) != string(want.Data) || r.Kind != want.Kind || r.Group != want.Group {
			t.Fatalf("ReadAt(%d) is not record %d", lsn, n)
		}
	}
}

// TestLargeRecord: a first batch that no prepared segment can hold gets a
// segment that can, at the start and after others.
func TestLargeRecord(t *testing.T) {
	onEach(t, func(t *testing.T, o Options) {
		l, _ := mustOpen(t, o)
		sizes := []int{200_000, 10, 100_000, 100_000, 10, 12_000, 50_000}
		var lsns []LSN
		for n, size := range sizes {
			lsns = append(lsns, l.Append(numbered(n, size)))
			if err := errors.Join(l.Flush(), l.Prepare()); err != nil {
				t.Fatal(err)
			}
		}
		for n, lsn := range lsns {
			checkRead(t, l, lsn, n)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l, k := mustOpen(t, o)
		for n, r := range k.recs {
			if number(r) != n || len(r.Data) != max(8, sizes[n]) {
				t.Fatalf("record %d of %d bytes where %d of %d should be", number(r), len(r.Data), n, sizes[n])
			}
		}
		if len(k.recs) != len(sizes) {
			t.Fatalf("%d records of %d", len(k.recs), len(sizes))
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestCarry: the latest record of a carried kind survives the release of the
// segment it was written to (mutant 40), as of the oldest segment's start.
func TestCarry(t *testing.T) {
	m := newMem(1)
	o := testOptions(m, 1)
	l, _ := mustOpen(t, o)
	l.Append(Record{Kind: kindState, Group: 0, Data: []byte("old")}, Record{Kind: kindState, Group: 9, Data: []byte("nine")})
	l.Append(Record{Kind: kindState, Group: 0, Data: []byte("new")})
	var lsns []LSN
	for n := range 40 {
		lsns = append(lsns, l.Append(numbered(n, 1000)))
		if err := errors.Join(l.Flush(), l.Prepare()); err != nil {
			t.Fatal(err)
		}
	}
	// This one is in the last segment, and must not be seen at the first's start.
	l.Append(Record{Kind: kindState, Group: 0, Data: []byte("newest")})
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	l.Release(lsns[39])
	if err := errors.Join(l.Prepare(), l.Close()); err != nil {
		t.Fatal(err)
	}
	l, k := mustOpen(t, o)
	defer l.Close()
	if number(k.recs[2]) == 0 {
		t.Fatal("nothing was released")
	}
	want := []string{"new", "nine"}
	for i, w := range want {
		if string(k.recs[i].Data) != w || k.lsns[i] != 0 || k.recs[i].Kind != kindState {
			t.Fatalf("record %d is %q with LSN %d, should be %q with LSN 0", i, k.recs[i].Data, k.lsns[i], w)
		}
	}
	if last := k.recs[len(k.recs)-1]; string(last.Data) != "newest" {
		t.Fatalf("the last record is %q", last.Data)
	}
}

// TestRestartsGrowNothing: neither clean restarts nor kills, with and without
// a batch that nothing proves, add segments for ever.
func TestRestartsGrowNothing(t *testing.T) {
	m := newMem(1)
	o := testOptions(m, 1)
	l, _ := mustOpen(t, o)
	l.Append(numbered(0, 10))
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		m.Kill()
		var k *kept
		l, k = mustOpen(t, o)
		if len(k.recs) != 1 {
			t.Fatalf("restart %d: %d records", i, len(k.recs))
		}
		if i%2 == 0 {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if s := l.Status(); s.Segments > 2 {
		t.Fatalf("%d segments after 100 restarts", s.Segments)
	}
}

// TestConcurrent runs every method at once, with the goroutine that prepares.
//
// More than 70 lines: the goroutines share what they check.
func TestConcurrent(t *testing.T) {
	onEach(t, func(t *testing.T, o Options) {
		before := runtime.NumGoroutine()
		o.PrepareInline = false
		o.MaxSegmentBytes, o.MaxSpares = 16*blockSize, 2
		l, _ := mustOpen(t, o)
		const writers, each = 4, 150
		type placed struct {
			lsn LSN
			n   int
		}
		var wg sync.WaitGroup
		placedC := make(chan placed, writers*each)
		for w := range writers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for i := range each {
					n := w*each + i
					lsn := l.Append(numbered(n, 64+n%700))
					if i%2 == 0 {
						if err := l.Flush(); err != nil {
							t.Error(err)
							return
						}
						if lsn > l.Durable() {
							t.Error("Flush returned too early")
						}
					}
					placedC <- placed{lsn, n}
				}
			}()
		}
		var readers sync.WaitGroup
		for range 2 {
			readers.Add(1)
			go func() {
				defer readers.Done()
				buf := make([]byte, 1024)
				i := 0
				for p := range placedC {
					r, err := l.ReadAt(p.lsn, buf)
					switch {
					case errors.Is(err, ErrReleased):
					case err != nil:
						t.Errorf("ReadAt(%d): %v", p.lsn, err)
					case number(r) != p.n:
						t.Errorf("ReadAt(%d) gives record %d, not %d", p.lsn, number(r), p.n)
					}
					if i++; i%20 == 0 && p.lsn > 20_000 {
						l.Release(p.lsn - 20_000)
						if err := l.Seal(); err != nil {
							t.Error(err)
						}
						l.Status()
					}
				}
			}()
		}
		wg.Wait()
		close(placedC)
		readers.Wait()
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
			if time.Now().After(end) { // those of the test have said that they are done, and end soon
				t.Fatalf("%d goroutines before, %d after Close", before, runtime.NumGoroutine())
			}
		}
		l, k := mustOpen(t, o)
		seen := map[int]bool{}
		for _, r := range k.recs {
			if seen[number(r)] {
				t.Fatalf("record %d twice", number(r))
			}
			seen[number(r)] = true
		}
		t.Logf("%d of %d records are still there, %+v", len(k.recs), writers*each, l.Status())
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
