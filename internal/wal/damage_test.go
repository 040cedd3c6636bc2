package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"example.com/raft/internal/vfs"
)

// damageLog builds a log of several segments. It returns its file system with
// everything synced, and a model of what it holds.
func damageLog(t *testing.T, sealed bool) (*vfs.Mem, *model) {
	t.Helper()
	fs := newMem(1)
	m := &model{o: testOptions(fs, 1)}
	m.o.MaxSegmentBytes = 5 * blockSize
	l, _ := mustOpen(t, m.o)
	for i := range 5 {
		m.append(l, 20)
		if i%2 == 0 {
			m.append(l, 50)
		}
		if err := errors.Join(m.flush(l), l.Prepare()); err != nil {
			t.Fatal(err)
		}
	}
	if s := l.Status(); s.Segments < 3 {
		t.Fatalf("only %d segments", s.Segments)
	}
	if sealed {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return fs.CrashClone(none), m
}

// written returns the ranges of each segment file that hold something: blocks
// that are not all zero.
func written(t *testing.T, fs *vfs.Mem, dir string) (files []string, blocksOf map[string][]int64) {
	t.Helper()
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	blocksOf = map[string][]int64{}
	for _, name := range names {
		if name == "lock" {
			continue
		}
		f, err := fs.Open(dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		size, _ := f.Size()
		b := make([]byte, blockSize)
		for off := int64(0); off < size; off += blockSize {
			if _, err := f.ReadAt(b, off); err != nil {
				t.Fatal(err)
			}
			if string(b) != string(zeroBlock[:]) {
				blocksOf[name] = append(blocksOf[name], off)
			}
		}
		files = append(files, name)
	}
	return files, blocksOf
}

// outcome of opening a damaged log.
type outcome int

const (
	correct  outcome = iota // everything is there
	refused                 // a typed error, and nothing changed on disk
	lostLast                // the records of the last batch are missing
	lostMore
	wrong
	unclear // another error
	changed // refused, and yet something changed on disk
	panicked
	outcomes
)

var outcomeNames = [outcomes]string{"correct", "clear error", "last batch lost silently", "more lost silently", "wrong data", "unclear error", "changed the disk", "panic"}

// openDamaged opens a damaged file system and classifies what happens. last is
// how many records the last batch holds.
func (m *model) openDamaged(fs *vfs.Mem, last int) (o outcome, err error) {
	defer func() {
		if p := recover(); p != nil {
			o, err = panicked, fmt.Errorf("panic: %v", p)
		}
	}()
	opts := m.o
	opts.FS = fs
	same := inspected(opts)
	changes := 0
	fs.SetHook(func(op vfs.Op) error {
		if op.Kind.Changes() && op.Kind != vfs.OpSyncDir {
			changes++
		}
		return nil
	})
	k := &kept{}
	_, err = Open(context.Background(), opts, k.replay)
	if err := same(k, err); err != nil {
		return wrong, err
	}
	if err != nil {
		var ce *CorruptError
		var ve *VersionError
		var te *TagError
		if !errors.As(err, &ce) && !errors.As(err, &ve) && !errors.As(err, &te) {
			return unclear, err
		}
		if changes > 0 {
			return changed, err
		}
		return refused, err
	}
	all := m.clone()
	all.acked = 0
	count, err := all.check(k)
	switch {
	case err != nil:
		return wrong, err
	case count == len(m.sizes):
		return correct, nil
	case count == len(m.sizes)-last:
		return lostLast, nil
	}
	return lostMore, fmt.Errorf("%d records of %d", count, len(m.sizes))
}

// TestDamage flips bits and clears sectors in every written block, one at a
// time. By default padding is sampled; -wal.sweep flips every bit.
func TestDamage(t *testing.T) {
	for _, sealed := range []bool{true, false} {
		t.Run(fmt.Sprintf("sealed=%v", sealed), func(t *testing.T) {
			fs, m := damageLog(t, sealed)
			if o, err := m.openDamaged(fs.CrashClone(none), 0); o != correct {
				t.Fatalf("the undamaged log: %s, %v", outcomeNames[o], err)
			}
			var table [2][outcomes]int
			note := func(row int, c *vfs.Mem, what string) {
				o, err := m.openDamaged(c, 2)
				table[row][o]++
				allowed := o == correct || o == refused || o == lostLast && !sealed
				if !allowed {
					t.Errorf("%s: %s: %v", what, outcomeNames[o], err)
				}
			}
			files, blocksOf := written(t, fs, m.o.Dir)
			nblocks := 0
			for _, name := range files {
				path := m.o.Dir + "/" + name
				f, err := fs.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				for _, off := range blocksOf[name] {
					nblocks++
					b := make([]byte, blockSize)
					if _, err := f.ReadAt(b, off); err != nil {
						t.Fatal(err)
					}
					end := len(bytes.TrimRight(b, "\x00"))
					for i := range blockSize {
						for bit := range uint(8) {
							// The zeros behind what is written are padding.
							if !*sweep && i >= end && (i*8+int(bit))%509 != 0 {
								continue
							}
							c := fs.CrashClone(none)
							if err := c.FlipBit(path, off+int64(i), bit); err != nil {
								t.Fatal(err)
							}
							note(0, c, fmt.Sprintf("bit %d of byte %d of %s", bit, off+int64(i), name))
						}
					}
					for i := 0; i < blockSize; i += 512 {
						c := fs.CrashClone(none)
						if err := c.ZeroSector(path, off+int64(i)); err != nil {
							t.Fatal(err)
						}
						note(1, c, fmt.Sprintf("sector at %d of %s", off+int64(i), name))
					}
					if t.Failed() {
						return
					}
				}
			}
			for row, what := range []string{"bits flipped", "sectors cleared"} {
				total, line := 0, ""
				for o, n := range table[row] {
					total += n
					line += fmt.Sprintf(", %s %d", outcomeNames[o], n)
				}
				t.Logf("%d blocks in %d files, %d %s%s", nblocks, len(files), total, what, line)
			}
		})
	}
}

// TestMissingSegment: a segment file that has gone is noticed, unless it is
// one of the oldest, which may have been released.
func TestMissingSegment(t *testing.T) {
	fs, m := damageLog(t, true)
	files, _ := written(t, fs, m.o.Dir)
	files = slices.DeleteFunc(files, func(name string) bool { return name == reserveName })
	for i, name := range files {
		c := fs.CrashClone(none)
		if err := c.Remove(m.o.Dir + "/" + name); err != nil {
			t.Fatal(err)
		}
		o, err := m.openDamaged(c, 2)
		t.Logf("%s missing: %s, %v", name, outcomeNames[o], err)
		prepared := i == len(files)-1 && name > "" && o == correct // never used
		oldest := i == 0 && o == wrong                             // the records' owner notices
		if o != refused && !prepared && !oldest {
			t.Errorf("%s missing: %s", name, outcomeNames[o])
		}
	}
}

// TestMissingRecoveredSegment: nor may the segment go into which the last batch
// was copied, which nothing proved, and all that was written after it. It is at
// the end of the log, and the one before it has been used to its middle only.
func TestMissingRecoveredSegment(t *testing.T) {
	for batches := 1; batches <= 20; batches++ {
		m := &model{o: testOptions(newMem(1), 1)}
		m.o.MinSegmentBytes, m.o.MaxSegmentBytes = 12*blockSize, 12*blockSize // no next one is prepared yet
		l, _ := mustOpen(t, m.o)
		for range batches {
			m.append(l, 20)
			if err := errors.Join(m.flush(l), l.Prepare()); err != nil {
				t.Fatal(err)
			}
		}
		fs := m.o.FS.(*vfs.Mem).CrashClone(none)
		l, _, err := m.open(fs)
		if err != nil {
			t.Fatal(err)
		}
		recovered, old := l.cur.name, l.segs[len(l.segs)-2]
		copied := old.off - 2*blockSize // before the final seal
		m.append(l, 30)
		if err := errors.Join(m.flush(l), l.Close()); err != nil {
			t.Fatal(err)
		}
		for _, rotten := range []bool{false, true} {
			c := fs.CrashClone(none)
			if rotten { // and so has the batch that was copied
				f, err := c.Open(m.o.Dir + "/" + old.name)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte{0xff}, copied+batchHeaderSize); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Remove(m.o.Dir + "/" + recovered); err != nil {
				t.Fatal(err)
			}
			if o, err := m.openDamaged(c, 1); o != refused {
				t.Errorf("%d batches, rotten %v, %s missing: %s, %v", batches, rotten, recovered, outcomeNames[o], err)
			}
		}
	}
}

// TestLost: a log that has held records and holds none is refused, whichever of
// its files are gone, and nothing is changed or made. Without Begun it is a new
// one.
func TestLost(t *testing.T) {
	whole := newMem(1)
	m := &model{o: testOptions(whole, 1)}
	l, _, err := m.open(whole)
	if err != nil {
		t.Fatal(err)
	}
	m.append(l, 20)
	if err := errors.Join(m.flush(l), l.Prepare(), l.Close()); err != nil {
		t.Fatal(err)
	}
	remove := func(fs *vfs.Mem, names ...string) {
		for _, name := range names {
			if err := fs.Remove(m.o.Dir + "/" + name); err != nil {
				t.Fatal(err)
			}
		}
	}
	for what, lose := range map[string]func(fs *vfs.Mem) *vfs.Mem{
		"the directory": func(*vfs.Mem) *vfs.Mem { return newMem(2) },
		"all segments":  func(fs *vfs.Mem) *vfs.Mem { remove(fs, fileName(1, segmentSuffix)); return fs },
		"all files":     func(fs *vfs.Mem) *vfs.Mem { remove(fs, fileName(1, segmentSuffix), reserveName, "lock"); return fs },
		"the only batch": func(fs *vfs.Mem) *vfs.Mem {
			name := m.o.Dir + "/" + fileName(1, segmentSuffix)
			if err := errors.Join(fs.ZeroSector(name, blockSize), fs.ZeroSector(name, 2*blockSize)); err != nil { // and its seal
				t.Fatal(err)
			}
			return fs
		},
		"the lock, no more": func(fs *vfs.Mem) *vfs.Mem { remove(fs, "lock"); return fs },
	} {
		fs := lose(whole.CrashClone(none))
		o := m.o
		o.FS, o.Begun = fs, true
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind.Changes() && op.Kind != vfs.OpSyncDir && what != "the lock, no more" {
				t.Errorf("without %s, Open does %+v", what, op)
			}
			return nil
		})
		same := inspected(o)
		k := &kept{}
		l, err := Open(t.Context(), o, k.replay)
		if err := same(k, err); err != nil {
			t.Errorf("without %s: %v", what, err)
		}
		if what == "the lock, no more" {
			if err != nil || l.Close() != nil || len(k.recs) != 1 {
				t.Errorf("without %s: %v", what, err)
			}
			continue
		}
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || corrupt.Do != doFind || fs.OpenFiles() != 0 {
			t.Errorf("without %s: %v", what, err)
		}
		fs.SetHook(nil)
		o.Begun = false
		if l, k := mustOpen(t, o); len(k.recs) > 0 || l.Close() != nil {
			t.Errorf("without %s: a new log holds %d records", what, len(k.recs))
		}
	}
}

// TestRefusals: files of another directory, a newer format or another number
// are refused by type.
func TestRefusals(t *testing.T) {
	fs, m := damageLog(t, true)
	files, _ := written(t, fs, m.o.Dir)
	rewrite := func(name string, change func(*segmentHeader)) *vfs.Mem {
		c := fs.CrashClone(none)
		f, err := c.Open(m.o.Dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, blockSize)
		if _, err := f.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		h, wrong := decodeSegmentHeader(b)
		if wrong != "" {
			t.Fatal(wrong)
		}
		change(&h)
		if _, err := f.WriteAt(h.encode(), 0); err != nil {
			t.Fatal(err)
		}
		return c
	}
	var ce *CorruptError
	var ve *VersionError
	var te *TagError
	for _, c := range []struct {
		what   string
		target any
		change func(*segmentHeader)
	}{
		{"newer version", &ve, func(h *segmentHeader) { h.version = 2 }},
		{"version 0", &ce, func(h *segmentHeader) { h.version = 0 }},
		{"other tag", &te, func(h *segmentHeader) { h.tag[15]++ }},
		{"other number", &ce, func(h *segmentHeader) { h.number++ }},
		{"other size", &ce, func(h *segmentHeader) { h.size -= blockSize }},
		{"other salt", &ce, func(h *segmentHeader) { h.salt++ }},
	} {
		o, err := m.openDamaged(rewrite(files[1], c.change), 2)
		if o != refused || !errors.As(err, c.target) {
			t.Errorf("%s: %s: %v", c.what, outcomeNames[o], err)
		}
		t.Logf("%s: %v", c.what, err)
	}
}

// TestRotAfterOpen: ReadAt never returns rotten data.
func TestRotAfterOpen(t *testing.T) {
	fs, m := damageLog(t, true)
	m.o.FS = fs
	l, k := mustOpen(t, m.o)
	defer l.Close()
	name := m.o.Dir + "/" + l.segs[0].name
	lsn, want := k.lsns[0], k.recs[0]
	start := int64(blockSize + batchHeaderSize)
	for off := start; off < start+recordHeadSize+int64(len(want.Data)); off++ {
		for bit := range uint(8) {
			if err := fs.FlipBit(name, off, bit); err != nil {
				t.Fatal(err)
			}
			r, err := l.ReadAt(lsn, nil)
			var ce *CorruptError
			if err == nil && (string(r.Data) != string(want.Data) || r.Kind != want.Kind || r.Group != want.Group) {
				t.Fatalf("bit %d of byte %d: wrong data", bit, off)
			} else if err != nil && !errors.As(err, &ce) {
				t.Fatalf("bit %d of byte %d: %v", bit, off, err)
			}
			if err := fs.FlipBit(name, off, bit); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestChain: batches that are valid by themselves, and do not follow each
// other, are refused.
func TestChain(t *testing.T) {
	fs := newMem(1)
	m := &model{o: testOptions(fs, 1)}
	m.o.MinSegmentBytes, m.o.MaxSegmentBytes = 8*blockSize, 8*blockSize
	l, _ := mustOpen(t, m.o)
	for range 3 {
		m.append(l, 100)
		if err := m.flush(l); err != nil {
			t.Fatal(err)
		}
	}
	salt := l.cur.header.salt
	for _, c := range []struct {
		what   string
		block  int64
		change func(*batchHeader)
	}{
		{"other number before", 2, func(h *batchHeader) { h.prev.seq++ }},
		{"other checksum before", 2, func(h *batchHeader) { h.prev.crc++ }},
		{"number not above the one before", 2, func(h *batchHeader) { h.seq = h.prev.seq }},
		{"newer version", 3, func(h *batchHeader) { h.version++ }},
		{"other checksum of heads", 2, func(h *batchHeader) { h.recordsCRC++ }},
	} {
		d := fs.CrashClone(none)
		f, err := d.Open(m.o.Dir + "/" + fileName(1, segmentSuffix))
		if err != nil {
			t.Fatal(err)
		}
		b, off := make([]byte, batchHeaderSize), c.block*blockSize
		if _, err := f.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		h, _, ok := decodeBatchHeader(b, off, salt)
		if !ok {
			t.Fatalf("no batch in block %d", c.block)
		}
		c.change(&h)
		h.encode(b, off)
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		o, err := m.openDamaged(d, 1)
		t.Logf("%s: %v", c.what, err)
		if o != refused {
			t.Errorf("%s: %s, %v", c.what, outcomeNames[o], err)
		}
	}
}

// TestFinalSealDamaged: without its final seal a segment seems to be the log's
// end. The batch in the one after it proves the damage, also if no third one does.
func TestFinalSealDamaged(t *testing.T) {
	fs := newMem(1)
	o := testOptions(fs, 1)
	l, _ := mustOpen(t, o)
	for n := 0; len(l.segs) < 2; n++ {
		l.Append(numbered(n, 1000))
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	name, seal := l.path(l.segs[0].name), l.segs[0].off-blockSize
	if err := errors.Join(l.Close(), fs.ZeroSector(name, seal)); err != nil {
		t.Fatal(err)
	}
	var corrupt *CorruptError
	if _, err := Open(t.Context(), o, (&kept{}).replay); !errors.As(err, &corrupt) || corrupt.File != name || corrupt.Offset != seal {
		t.Fatalf("%v, want damage of %s at %d", err, name, seal)
	}
}
