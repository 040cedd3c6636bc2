package wal

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/vfs"
)

// TestStall: while a sync is stuck, Append, Durable and ReadAt go on, and the
// flushes that wait are then served by one sync.
func TestStall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMem(1)
		o := testOptions(fs, 1)
		o.PrepareInline = false
		o.MinSegmentBytes, o.MaxSegmentBytes, o.ReserveBytes = 64*blockSize, 64*blockSize, -1
		l, _ := mustOpen(t, o)
		first := l.Append(numbered(0, 50))
		release := make(chan struct{})
		syncs := 0
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpSync {
				syncs++
				if syncs == 1 {
					<-release
				}
			}
			return nil
		})
		results := make(chan error, 10)
		go func() { results <- l.Flush() }()
		synctest.Wait()
		var last LSN
		for n := 1; n < 10; n++ {
			last = l.Append(numbered(n, 50))
			go func() { results <- l.Flush() }()
		}
		synctest.Wait()
		if len(results) != 0 || l.Durable() >= first {
			t.Fatal("a flush returned before its sync")
		}
		checkRead(t, l, first, 0) // being written
		checkRead(t, l, last, 9)  // staged
		closed := make(chan error)
		close(release)
		for range 10 {
			if err := <-results; err != nil {
				t.Fatal(err)
			}
		}
		if syncs != 2 {
			t.Fatalf("%d syncs for 10 flushes, should be 2", syncs)
		}
		go func() { closed <- l.Close() }()
		if err := <-closed; err != nil {
			t.Fatal(err)
		}
	})
}

// TestCloseWaitsForASync: Close during a stuck sync returns when that ends.
func TestCloseWaitsForASync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMem(1)
		l, _ := mustOpen(t, testOptions(fs, 1))
		l.Append(numbered(0, 50))
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpSync {
				time.Sleep(3 * time.Second)
			}
			return nil
		})
		start := time.Now()
		flushed := make(chan error, 1)
		go func() { flushed <- l.Flush() }()
		synctest.Wait()
		second := make(chan error, 1)
		go func() { second <- l.Close() }()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-second; err != nil {
			t.Fatal(err)
		}
		if err := <-flushed; err != nil && !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 6*time.Second { // the batch's and the seal's
			t.Fatalf("Close took %v", d)
		}
		if n := fs.OpenFiles(); n != 0 {
			t.Fatalf("%d files are open", n)
		}
	})
}

// TestPinned: a segment that is being read is neither removed nor recycled.
func TestPinned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := newMem(1)
		l, _ := mustOpen(t, testOptions(fs, 1))
		var lsns []LSN
		for n := range 40 {
			lsns = append(lsns, l.Append(numbered(n, 1500)))
			if err := errors.Join(l.Flush(), l.Prepare()); err != nil {
				t.Fatal(err)
			}
		}
		segments := l.Status().Segments
		release := make(chan struct{})
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpRead {
				<-release
			}
			return nil
		})
		type result struct {
			r   Record
			err error
		}
		got := make(chan result)
		go func() {
			r, err := l.ReadAt(lsns[0], nil)
			got <- result{r, err}
		}()
		synctest.Wait()
		l.Release(lsns[39])
		if err := l.Prepare(); err != nil {
			t.Fatal(err)
		}
		if s := l.Status(); s.Segments != segments {
			t.Fatalf("%d segments of %d are left while the oldest is read", s.Segments, segments)
		}
		close(release)
		if g := <-got; g.err != nil || number(g.r) != 0 {
			t.Fatalf("the record being read: %v", g.err)
		}
		if err := l.Prepare(); err != nil {
			t.Fatal(err)
		}
		if s := l.Status(); s.Segments >= segments {
			t.Fatal("nothing is released after the read")
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestSteadyState: a flush is one write and one sync inside a file whose size
// does not change, and an append allocates nothing.
func TestSteadyState(t *testing.T) {
	fs := newMem(1)
	o := testOptions(fs, 1)
	o.MinSegmentBytes, o.MaxSegmentBytes = 1<<20, 1<<20
	l, _ := mustOpen(t, o)
	defer l.Close()
	data := make([]byte, 128)
	var ops []string
	fs.SetHook(func(op vfs.Op) error {
		ops = append(ops, op.Kind.String())
		if op.Kind == vfs.OpWrite && (op.Offset%blockSize != 0 || op.Size%blockSize != 0 || op.Offset+int64(op.Size) > 1<<20) {
			t.Errorf("a write of %d bytes at %d", op.Size, op.Offset)
		}
		return nil
	})
	for range 100 {
		ops = ops[:0]
		for range 10 {
			l.Append(Record{Kind: kindData, Data: data})
		}
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(ops, " "); got != "write sync" {
			t.Fatalf("a flush does %q", got)
		}
	}
	if err := l.Flush(); err != nil || len(ops) != 2 {
		t.Fatalf("a flush of nothing does I/O: %v, %v", ops, err)
	}
	fs.SetHook(nil)
	allocs := testing.AllocsPerRun(100, func() {
		l.Append(Record{Kind: kindData, Data: data[:64], Parts: [][]byte{data[64:]}})
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
	})
	if allocs > 2 { // Mem makes a page per block it first writes, and the index grows
		t.Errorf("%v allocations per append and flush", allocs)
	}
}

// TestDeterministic: equal seeds give equal operations and equal bytes.
func TestDeterministic(t *testing.T) {
	run := func() string {
		fs := newMem(3)
		var trace strings.Builder
		fs.SetHook(func(op vfs.Op) error {
			fmt.Fprintln(&trace, op)
			return nil
		})
		m := &model{o: testOptions(fs, 3)}
		l, _ := mustOpen(t, m.o)
		if err := errors.Join(m.workload(l, 30, newRand(3)), l.Close()); err != nil {
			t.Fatal(err)
		}
		fs.Crash(newRand(4).IntN)
		l, _ = mustOpen(t, m.o)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		names, _ := fs.List(m.o.Dir)
		for _, name := range names {
			if name != "lock" {
				trace.WriteString(name)
				trace.Write(readAll(t, fs, m.o.Dir+"/"+name))
			}
		}
		return trace.String()
	}
	if first, second := run(), run(); first != second {
		t.Fatal("two runs of one seed differ")
	}
}

// TestMisplaced: a valid batch at another place than it was written to, or in
// another segment, is no batch.
func TestMisplaced(t *testing.T) {
	fs, m := damageLog(t, true)
	files, blocksOf := written(t, fs, m.o.Dir)
	tried := 0
	for _, from := range files {
		whole := readAll(t, fs, m.o.Dir+"/"+from)
		for _, off := range blocksOf[from] {
			for _, to := range files {
				for _, at := range blocksOf[to] {
					if from == to && off == at {
						continue
					}
					c := fs.CrashClone(none)
					f, err := c.Open(m.o.Dir + "/" + to)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := f.WriteAt(whole[off:off+blockSize], at); err != nil {
						t.Fatal(err)
					}
					tried++
					if o, err := m.openDamaged(c, 2); o != correct && o != refused {
						t.Errorf("block %d of %s at %d of %s: %s, %v", off, from, at, to, outcomeNames[o], err)
					}
				}
			}
		}
	}
	// Within free space of the right segment, too: a later copy must not be
	// taken for damage or for a batch.
	for _, off := range blocksOf[files[0]] {
		whole := readAll(t, fs, m.o.Dir+"/"+files[2])
		c := fs.CrashClone(none)
		f, _ := c.Open(m.o.Dir + "/" + files[2])
		if _, err := f.WriteAt(whole[off:off+blockSize], int64(len(whole))-blockSize); err != nil {
			t.Fatal(err)
		}
		tried++
		if o, err := m.openDamaged(c, 2); o != correct {
			t.Errorf("block %d of %s copied to its end: %s, %v", off, files[2], outcomeNames[o], err)
		}
	}
	t.Logf("%d misplaced blocks", tried)
}

// TestOpenStops: an error of replay and a cancelled context end Open, which
// leaves nothing open.
func TestOpenStops(t *testing.T) {
	fs, m := damageLog(t, true)
	m.o.FS = fs
	mine := errors.New("mine")
	n := 0
	_, err := Open(context.Background(), m.o, func(LSN, Record) error {
		if n++; n == 3 {
			return mine
		}
		return nil
	})
	if !errors.Is(err, mine) || n != 3 {
		t.Fatalf("%v after %d records", err, n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	_, err = Open(ctx, m.o, func(LSN, Record) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if n := fs.OpenFiles(); n != 0 {
		t.Fatalf("%d files are open", n)
	}
	for _, o := range []Options{{}, {FS: fs}, {FS: fs, Dir: "d", MinSegmentBytes: 5000}, {FS: fs, Dir: "d", MinSegmentBytes: 1 << 20, MaxSegmentBytes: 1 << 19}} {
		if _, err := Open(context.Background(), o, nil); err == nil {
			t.Errorf("Open accepts %+v", o)
		}
	}
}

// fourSectors appends a batch of four sectors, one record in each.
func (m *model) fourSectors(l *Log) {
	m.append(l, 512-batchHeaderSize-recordHeadSize)
	for range 3 {
		m.append(l, 512-recordHeadSize)
	}
}

// TestFourSectors tries all 256 fates of the first four sectors of a batch
// that no sync has covered, with what else is in doubt kept, for batches at
// the start of a segment, after a batch, after a seal, and of seals.
func TestFourSectors(t *testing.T) {
	for name, prepare := range map[string]func(*model, *Log) error{
		"first":       func(m *model, l *Log) error { return nil },
		"after batch": func(m *model, l *Log) error { m.append(l, 100); return m.flush(l) },
		"after seal":  func(m *model, l *Log) error { m.append(l, 100); return errors.Join(m.flush(l), l.Seal()) },
		"new segment": func(m *model, l *Log) error { m.append(l, 2000); m.append(l, 1500); return m.flush(l) },
		// All batches of one shape, with records that end with sectors: a lost
		// sector shows a whole valid record of the recycled file.
		"recycled": func(m *model, l *Log) error {
			var err error
			for n := 0; n < 12 && err == nil; n++ {
				m.fourSectors(l)
				err = m.flush(l)
				m.released = len(m.lsns) - 1
				l.Release(m.lsns[m.released])
				err = errors.Join(err, l.Prepare())
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			fs := newMem(5)
			m := &model{o: testOptions(fs, 5)}
			l, _ := mustOpen(t, m.o)
			if err := prepare(m, l); err != nil {
				t.Fatal(err)
			}
			tried := 0
			var written vfs.Op
			fs.SetHook(func(op vfs.Op) error {
				if op.Kind == vfs.OpWrite {
					written = op
				}
				if op.Kind != vfs.OpSync || written.Offset == 0 { // not a batch
					return nil
				}
				for fate := range 256 {
					sector := 0
					c := fs.CrashClone(func(n int) int {
						sector++
						if n == 4 && sector <= 4 {
							return fate >> (2 * (sector - 1)) & 3
						}
						return 1
					})
					tried++
					m.clone().afterCrash(t, c, newRand(uint64(fate)), fate&3 == 1 && fate>>4 == 0)
				}
				return nil
			})
			m.fourSectors(l)
			if err := m.flush(l); err != nil {
				t.Fatal(err)
			}
			if err := l.Seal(); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d crashes", tried)
		})
	}
}

// TestReleaseDuringRoll: while the first batch of a new segment, with its
// carried records, is not synced, the segment before stays (mutant 40).
func TestReleaseDuringRoll(t *testing.T) {
	fs := newMem(1)
	l, _ := mustOpen(t, testOptions(fs, 1))
	l.Append(Record{Kind: kindState, Data: []byte("state")})
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	rolls := 0
	fs.SetHook(func(op vfs.Op) error {
		if op.Kind != vfs.OpWrite || op.Offset != blockSize || op.Size != blockSize {
			return nil // not a first batch
		}
		rolls++
		l.Release(l.Durable() + 1)
		if err := l.Prepare(); err != nil {
			t.Error(err)
		}
		o := testOptions(fs.CrashClone(none), 2)
		_, k := mustOpen(t, o)
		if len(k.recs) == 0 || string(k.recs[0].Data) != "state" {
			t.Errorf("roll %d: the carried record is lost", rolls)
		}
		return nil
	})
	for n := range 20 {
		l.Append(numbered(n, 100))
		if err := errors.Join(l.Flush(), l.Prepare()); err != nil {
			t.Fatal(err)
		}
	}
	if rolls < 3 {
		t.Fatalf("only %d rolls", rolls)
	}
}

// checkState fills and releases segments until those before are gone. The latest
// carried record is "new", also when power is cut in between.
func checkState(t *testing.T, l *Log, o Options) {
	t.Helper()
	oldest := l.cur.header.number
	o.FS.(*vfs.Mem).SetHook(func(op vfs.Op) error {
		if got := stateIn(t, o); got != "new" {
			t.Fatalf("before %+v the carried record is %q", op, got)
		}
		return nil
	})
	for n := range 10 {
		last := l.Append(numbered(n, 1000))
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
		l.Release(last)
		if err := l.Prepare(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l.segs[0].header.number <= oldest {
		t.Fatalf("segment %d is still there", oldest)
	}
	if got := stateIn(t, o); got != "new" {
		t.Fatalf("the carried record is %q", got)
	}
}

func stateIn(t *testing.T, o Options) (state string) {
	t.Helper()
	o.FS = o.FS.(*vfs.Mem).CrashClone(none)
	l, k := mustOpen(t, o)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, r := range k.recs {
		if r.Kind == kindState {
			state = string(r.Data)
		}
	}
	return state
}

// TestCarryThroughEmptySegment: power was cut before the first batch of a
// segment. The next batch is too large for it, so it is left with what is
// carried: it may be the oldest one some day.
func TestCarryThroughEmptySegment(t *testing.T) {
	fs := newMem(1)
	o := testOptions(fs, 1)
	l, _ := mustOpen(t, o)
	l.Append(Record{Kind: kindState, Data: []byte("new")})
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	var cut *vfs.Mem
	fs.SetHook(func(op vfs.Op) error {
		if op.Kind == vfs.OpWrite && op.Offset == blockSize {
			cut = fs.CrashClone(none)
		}
		return nil
	})
	for n := 0; cut == nil; n++ {
		l.Append(numbered(n, 1000))
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	o.FS = cut
	l, _ = mustOpen(t, o)
	if l.cur.off != blockSize || l.cur.header.number != 2 {
		t.Fatalf("the log goes on at offset %d of segment %d", l.cur.off, l.cur.header.number)
	}
	const large = 8 * blockSize
	if err := l.Claim(large + 1000); err != nil {
		t.Fatal(err)
	}
	l.Append(numbered(0, large))
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	if len(l.segs) != 3 || l.segs[1].header.number != 2 {
		t.Fatalf("%d segments", len(l.segs))
	}
	checkState(t, l, o)
}

// TestCarryAfterDiskFull: a batch that found no space is written together with
// what came meanwhile, and what of that is carried is carried.
func TestCarryAfterDiskFull(t *testing.T) {
	fs := newMem(1)
	o := testOptions(fs, 1)
	o.ReserveBytes = -1
	l, _ := mustOpen(t, o)
	l.Append(Record{Kind: kindState, Data: []byte("old")})
	full := false
	fs.SetHook(func(op vfs.Op) error {
		if op.Kind != vfs.OpCreate {
			return nil
		}
		if !full {
			l.Append(Record{Kind: kindState, Data: []byte("new")})
		}
		full = true
		return syscall.ENOSPC
	})
	err := l.Flush()
	for n := 0; err == nil; n++ {
		l.Append(numbered(n, 1000))
		err = l.Flush()
	}
	if !errors.Is(err, ErrDiskFull) || errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	fs.SetHook(nil)
	if err := errors.Join(l.Prepare(), l.Flush()); err != nil {
		t.Fatal(err)
	}
	checkState(t, l, o)
}

// TestFillPieces: the next segment is filled with zeros in small pieces, between
// which the writer's syncs get their turn, and in large ones while the current
// segment would be full before that is done.
func TestFillPieces(t *testing.T) {
	const size = 16 << 20
	for _, c := range []struct {
		name     string
		used     int // of the current segment
		min, max int // of the largest piece
	}{
		{"the writer is slow", size/2 + size/64, 256 << 10, 1 << 20},
		{"the writer is quick", size - size/16, 4 << 20, 5 << 20},
	} {
		fs := newMem(1)
		o := testOptions(fs, 1)
		o.MinSegmentBytes, o.MaxSegmentBytes, o.ReserveBytes = size, size, -1
		l, _ := mustOpen(t, o)
		for n := 0; n < c.used>>16; n++ {
			l.Append(numbered(n, 1<<16-100))
		}
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
		piece, largest := 0, 0
		fs.SetHook(func(op vfs.Op) error {
			switch {
			case !strings.HasSuffix(op.Name, spareSuffix):
			case op.Kind == vfs.OpWrite:
				piece += op.Size
				largest = max(largest, piece)
			case op.Kind == vfs.OpSync:
				piece = 0
			}
			return nil
		})
		if err := l.Prepare(); err != nil {
			t.Fatal(err)
		}
		fs.SetHook(nil)
		if largest < c.min || largest > c.max {
			t.Errorf("%s: the largest piece has %d bytes, want %d to %d", c.name, largest, c.min, c.max)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
