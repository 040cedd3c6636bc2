package snap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"testing"

	"example.com/raft/internal/vfs"
)

// outcome of reading a damaged snapshot.
type outcome int

const (
	correct outcome = iota // header and payload are what was written
	refused                // a typed error, and every byte given out before it is right
	wrong
	unclear // another error
	panicked
	outcomes
)

var outcomeNames = [outcomes]string{"correct", "clear error", "wrong data", "unclear error", "panic"}

// readDamaged reads a damaged snapshot in order, in reverse and at once.
func readDamaged(fsys vfs.FS, name string, header, data []byte) (o outcome, err error) {
	defer func() {
		if p := recover(); p != nil {
			o, err = panicked, fmt.Errorf("panic: %v", p)
		}
	}()
	defer func() {
		file, readErr := fileBytes(fsys, name)
		if readErr != nil || o > refused {
			return
		}
		if disagree := decodeAgrees(file, header, data, o == correct); disagree != nil {
			o, err = wrong, disagree
		}
	}()
	r, err := Open(fsys, testDir, name)
	if err != nil {
		return typed(err), err
	}
	defer r.Close()
	if !bytes.Equal(r.Header(), header) || r.Size() != int64(len(data)) {
		return wrong, errors.New("another header or size")
	}
	piece := len(data)/12 + 3 // no multiple of a block
	pieces := func(yield func(int) bool) {
		for off := 0; off < len(data); off += piece {
			if !yield(off) {
				return
			}
		}
		for off := len(data) / piece * piece; off >= 0; off -= piece {
			if !yield(off) {
				return
			}
		}
	}
	for off := range pieces {
		if o, err2 := readPiece(r, data, off, min(piece, len(data)-off)); o > refused {
			return o, err2
		} else if err == nil {
			err = err2
		}
	}
	if o, err2 := readPiece(r, data, 0, len(data)); o != correct {
		return o, err2
	}
	if err != nil {
		return refused, err
	}
	return correct, nil
}

func readPiece(r *Reader, data []byte, off, size int) (outcome, error) {
	p := make([]byte, size)
	n, err := r.ReadAt(p, int64(off))
	if !bytes.Equal(p[:n], data[off:][:n]) || n < size && err == nil {
		return wrong, fmt.Errorf("%d bytes at %d are not what was written", n, off)
	}
	if !bytes.Equal(p[n:], make([]byte, size-n)) {
		return wrong, fmt.Errorf("bytes that were not checked are in the buffer behind %d at %d", n, off)
	}
	if err != nil {
		return typed(err), err
	}
	return correct, nil
}

func typed(err error) outcome {
	var ce *CorruptError
	var ve *VersionError
	if errors.As(err, &ce) || errors.As(err, &ve) {
		return refused
	}
	return unclear
}

// tally counts outcomes of one kind of damage.
type tally struct {
	t            *testing.T
	header, data []byte
	counts       [outcomes]int
}

func (y *tally) try(fsys vfs.FS, name, what string) {
	y.t.Helper()
	o, err := readDamaged(fsys, name, y.header, y.data)
	y.counts[o]++
	if o > refused {
		y.t.Errorf("%s: %s: %v", what, outcomeNames[o], err)
	}
}

func (y *tally) report(what string) {
	total, line := 0, ""
	for o, n := range y.counts {
		total += n
		line += fmt.Sprintf(", %s %d", outcomeNames[o], n)
	}
	y.t.Logf("%d %s%s", total, what, line)
	y.counts = [outcomes]int{}
}

// TestDamage: every bit turned over, every sector cleared, every length cut,
// and bytes added, in small snapshots of several shapes. A file has no padding,
// so that each of these is noticed; only clearing what is zero is none.
func TestDamage(t *testing.T) {
	for _, c := range []struct{ header, data, block int }{{0, 0, 64}, {20, 0, 64}, {11, 64, 64}, {100, 3*64 + 5, 64}, {30, 2100, 700}} {
		t.Run(fmt.Sprintf("header=%d/data=%d", c.header, c.data), func(t *testing.T) {
			y := &tally{t: t, header: payload(1, c.header), data: payload(2, c.data)}
			fsys := newMem(1)
			write(t, fsys, "a", y.header, y.data, 5, c.block)
			path, whole := testDir+"/a"+suffix, fileOf(t, fsys, "a")
			y.try(fsys, "a", "undamaged")
			if y.counts[correct] != 1 {
				t.Fatal("the undamaged snapshot is refused")
			}
			y.counts = [outcomes]int{}
			for off := range whole {
				for bit := range uint(8) {
					if err := fsys.FlipBit(path, int64(off), bit); err != nil {
						t.Fatal(err)
					}
					y.try(fsys, "a", fmt.Sprintf("bit %d of byte %d", bit, off))
					if err := fsys.FlipBit(path, int64(off), bit); err != nil {
						t.Fatal(err)
					}
				}
			}
			all := y.counts[refused] == 8*len(whole)
			y.report("bits flipped")
			for off := 0; off < len(whole); off += 512 {
				c := fsys.CrashClone(func(int) int { return 0 })
				if err := c.ZeroSector(path, int64(off)); err != nil {
					t.Fatal(err)
				}
				y.try(c, "a", fmt.Sprintf("sector at %d", off))
			}
			all = all && y.counts[correct] == 0
			y.report("sectors cleared")
			for n := range whole {
				setFile(t, fsys, "a", whole[:n])
				y.try(fsys, "a", fmt.Sprintf("cut to %d bytes", n))
			}
			for n := range 100 {
				setFile(t, fsys, "a", append(slices.Clip(whole), make([]byte, n+1)...))
				y.try(fsys, "a", fmt.Sprintf("%d bytes added", n+1))
				setFile(t, fsys, "a", append(slices.Clip(whole), whole[max(0, len(whole)-n-1):]...))
				y.try(fsys, "a", fmt.Sprintf("its last %d bytes added", n+1))
			}
			if all = all && y.counts[correct] == 0; !all {
				t.Error("some damage was not noticed")
			}
			y.report("other lengths")
			if n := fsys.OpenFiles(); n != 0 {
				t.Errorf("%d files are open", n)
			}
		})
	}
}

// TestMisplaced: blocks, headers and ends that are whole, but of another place
// or another file, are noticed.
func TestMisplaced(t *testing.T) {
	const block, header, blocks = 64, 10, 5
	y := &tally{t: t, header: payload(1, header), data: payload(2, blocks*block)}
	fsys := newMem(1)
	write(t, fsys, "a", y.header, y.data, 5, block)
	whole := fileOf(t, fsys, "a")
	const start, space = headSize + header, sumSize + block
	at := func(b []byte, i int) []byte { return b[start+i*space:][:space] }
	for i := range blocks {
		for j := range blocks {
			if i == j {
				continue
			}
			b := slices.Clone(whole)
			copy(at(b, i), at(whole, j))
			setFile(t, fsys, "a", b)
			y.try(fsys, "a", fmt.Sprintf("block %d over block %d", j, i))
			copy(at(b, j), at(whole, i))
			setFile(t, fsys, "a", b)
			y.try(fsys, "a", fmt.Sprintf("blocks %d and %d swapped", j, i))
		}
	}
	y.report("blocks misplaced")
	for _, salt := range []uint64{6, 5 + 1<<32, 5 + 1<<63} {
		write(t, fsys, "b", y.header, payload(3, blocks*block), salt, block)
		other := fileOf(t, fsys, "b")
		for i := range blocks {
			b := slices.Clone(whole)
			copy(at(b, i), at(other, i))
			setFile(t, fsys, "a", b)
			y.try(fsys, "a", fmt.Sprintf("block %d of salt %d", i, salt))
		}
		setFile(t, fsys, "a", append(slices.Clone(whole[:start+blocks*space]), other[start+blocks*space:]...))
		y.try(fsys, "a", fmt.Sprintf("the end of salt %d", salt))
		setFile(t, fsys, "a", append(slices.Clone(other[:start]), whole[start:]...))
		y.try(fsys, "a", fmt.Sprintf("the start of salt %d", salt))
	}
	y.report("parts of other files")
	for i := range blocks {
		b := slices.Delete(slices.Clone(whole), start+i*space, start+(i+1)*space)
		setFile(t, fsys, "a", b)
		y.try(fsys, "a", fmt.Sprintf("without block %d", i))
		b = slices.Insert(slices.Clone(whole), start+i*space, at(whole, i)...)
		setFile(t, fsys, "a", b)
		y.try(fsys, "a", fmt.Sprintf("block %d twice", i))
	}
	if y.counts[correct] > 0 {
		t.Error("some of it was not noticed")
	}
	y.report("blocks missing or twice")
}

// TestSameSalt: even if two files had one salt, a block of one in the other is
// noticed by whoever reads all blocks in order, by the checksum of checksums.
func TestSameSalt(t *testing.T) {
	const block, start, space = 64, headSize, sumSize + 64
	for blocks := range 4 {
		fsys, data := newMem(1), payload(2, blocks*block)
		write(t, fsys, "a", nil, data, 5, block)
		write(t, fsys, "b", nil, payload(3, blocks*block), 5, block)
		whole, other := fileOf(t, fsys, "a"), fileOf(t, fsys, "b")
		for i := range blocks {
			b := slices.Clone(whole)
			copy(b[start+i*space:][:space], other[start+i*space:][:space])
			setFile(t, fsys, "a", b)
			_, _, err := read(fsys, "a")
			var ce *CorruptError
			if !errors.As(err, &ce) {
				t.Errorf("block %d of %d: %v", i, blocks, err)
			}
			if _, p, err := decode(bytes.NewReader(b)); typed(err) != refused || i == blocks-1 && !bytes.Equal(p, data[:i*block]) {
				t.Errorf("block %d of %d, as a stream: %d bytes, %v", i, blocks, len(p), err)
			}
		}
	}
	fsys := newMem(1) // without a block, Open notices the end of a file with another header
	write(t, fsys, "a", []byte("one"), nil, 5, block)
	write(t, fsys, "b", []byte("two"), nil, 5, block)
	whole, other := fileOf(t, fsys, "a"), fileOf(t, fsys, "b")
	setFile(t, fsys, "a", append(slices.Clone(whole[:start+3]), other[start+3:]...))
	if _, err := Open(fsys, testDir, "a"); typed(err) != refused {
		t.Errorf("the end of another header: %v", err)
	}
}

// TestForged: lengths that are wrong, under checksums that are right, are
// refused by type, and nothing is allocated for them.
func TestForged(t *testing.T) {
	fsys := newMem(1)
	write(t, fsys, "a", payload(1, 10), payload(2, 100), 5, 64)
	whole := fileOf(t, fsys, "a")
	le, endAt := binary.LittleEndian, len(whole)-endSize
	for _, c := range []struct {
		what  string
		newer bool
		forge func(b []byte)
	}{
		{"a newer version", true, func(b []byte) { le.PutUint32(b[12:], formatVersion+1) }},
		{"the newest version", true, func(b []byte) { le.PutUint32(b[12:], 1<<32-1) }},
		{"a newer version of unknown layout", true, func(b []byte) {
			le.PutUint32(b[12:], 9)
			copy(b[24:36], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
		}},
		{"version 0", false, func(b []byte) { le.PutUint32(b[12:], 0) }},
		{"blocks of 0", false, func(b []byte) { le.PutUint32(b[24:], 0) }},
		{"blocks of 32", false, func(b []byte) { le.PutUint32(b[24:], 32) }},
		{"blocks above the limit", false, func(b []byte) { le.PutUint32(b[24:], maxBlockSize+1) }},
		{"blocks of 4 GiB", false, func(b []byte) { le.PutUint32(b[24:], 1<<32-1) }},
		{"a longer header", false, func(b []byte) { le.PutUint32(b[28:], 11) }},
		{"a header up to the end", false, func(b []byte) { le.PutUint32(b[28:], uint32(len(b)-headSize-endSize)) }},
		{"a header of 1 MiB", false, func(b []byte) { le.PutUint32(b[28:], MaxHeaderBytes) }},
		{"a header of 4 GiB", false, func(b []byte) { le.PutUint32(b[28:], 1<<32-1) }},
		{"no blocks", false, func(b []byte) { le.PutUint64(b[endAt+16:], 0) }},
		{"3 blocks", false, func(b []byte) { le.PutUint64(b[endAt+16:], 3) }},
		{"2^64-1 blocks", false, func(b []byte) { le.PutUint64(b[endAt+16:], 1<<64-1) }},
		{"a payload of 99", false, func(b []byte) { le.PutUint64(b[endAt+24:], 99) }},
		{"a payload of 2^63", false, func(b []byte) { le.PutUint64(b[endAt+24:], 1<<63) }},
		{"a payload of 2^64-1", false, func(b []byte) { le.PutUint64(b[endAt+24:], 1<<64-1) }},
		{"a sum of lengths that overflows to the right one", false, func(b []byte) {
			blocks := uint64(1<<64-1)/(64+sumSize) + 2
			le.PutUint64(b[endAt+16:], blocks+1)
			le.PutUint64(b[endAt+24:], 64*blocks+20)
		}},
		{"nothing, 2^64-1 bytes", false, func(b []byte) { le.PutUint64(b[endAt+16:], 0); le.PutUint64(b[endAt+24:], 1<<64-1) }},
	} {
		b := slices.Clone(whole)
		c.forge(b)
		copy(b[8:12], le.AppendUint32(nil, checksum(0, b[12:headSize])))
		copy(b[endAt+8:], le.AppendUint32(nil, checksum(placed(5, int64(endAt)), b[endAt+12:])))
		setFile(t, fsys, "a", b)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Open(fsys, testDir, "a")
		runtime.ReadMemStats(&after)
		var ce *CorruptError
		var ve *VersionError
		if c.newer != errors.As(err, &ve) || c.newer == errors.As(err, &ce) {
			t.Errorf("%s: %v", c.what, err)
		}
		if _, _, err := decode(bytes.NewReader(b)); typed(err) != refused || c.newer != errors.As(err, &ve) {
			t.Errorf("%s, as a stream: %v", c.what, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 64<<10 {
			t.Errorf("%s: %d bytes were allocated", c.what, n)
		}
	}
	setFile(t, fsys, "a", whole)
	if _, _, err := read(fsys, "a"); err != nil {
		t.Errorf("the file as it was: %v", err)
	}
	if n := fsys.OpenFiles(); n != 0 {
		t.Errorf("%d files are open", n)
	}
}

// TestLimits: files that keep to the format are refused if their blocks or
// header are above the limits, and read at them.
func TestLimits(t *testing.T) {
	fsys := newMem(1)
	for over := range 2 {
		write(t, fsys, "a", nil, payload(2, 100), 5, maxBlockSize+over)
		_, _, err := read(fsys, "a")
		if o := typed(err); over == 1 && o != refused || over == 0 && err != nil {
			t.Errorf("blocks %d above the limit: %v", over, err)
		}
		header := make([]byte, MaxHeaderBytes+over)
		h := head{version: formatVersion, salt: 5, blockSize: 64, header: uint32(len(header)), headerCRC: checksum(0, header)}
		b := h.encode()
		e := end{sums: checksum(0, b[8:12])}
		setFile(t, fsys, "a", slices.Concat(b, header, e.encode(5, int64(headSize+len(header)))))
		_, _, err = read(fsys, "a")
		if o := typed(err); over == 1 && o != refused || over == 0 && err != nil {
			t.Errorf("a header %d above the limit: %v", over, err)
		}
	}
}

// TestRotAfterOpen: bits that turn over, or a file that is cut, while the
// snapshot is open are noticed as well.
func TestRotAfterOpen(t *testing.T) {
	fsys, data := newMem(1), payload(2, 200)
	write(t, fsys, "a", nil, data, 5, 64)
	path := testDir + "/a" + suffix
	for off := int64(headSize); off < headSize+4*sumSize+200; off++ {
		r, err := Open(fsys, testDir, "a")
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := fsys.FlipBit(path, off, uint(off)); err != nil {
				t.Fatal(err)
			}
			_, err = readPiece(r, data, 0, len(data))
		}
		if err != nil {
			t.Errorf("a byte that was damaged for a while: %v", err)
		}
		if err := fsys.FlipBit(path, off, uint(off)); err != nil {
			t.Fatal(err)
		}
		r2, err := Open(fsys, testDir, "a")
		if err != nil {
			t.Fatal(err)
		}
		if o, err := readPiece(r2, data, 0, len(data)); o != refused {
			t.Errorf("byte %d: %s, %v", off, outcomeNames[o], err)
		}
		if err := errors.Join(fsys.FlipBit(path, off, uint(off)), r.Close(), r2.Close()); err != nil {
			t.Fatal(err)
		}
	}
	r, err := Open(fsys, testDir, "a")
	if err != nil {
		t.Fatal(err)
	}
	f, err := fsys.Open(path)
	if err := errors.Join(err, f.Truncate(150)); err != nil {
		t.Fatal(err)
	}
	if o, err := readPiece(r, data, 0, len(data)); o != refused {
		t.Errorf("cut while open: %s, %v", outcomeNames[o], err)
	}
	if err := errors.Join(r.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestReadFails: a read that fails is an error of the disk and not of the
// snapshot, and the Reader goes on when the disk does.
func TestReadFails(t *testing.T) {
	for fail := 1; ; fail++ {
		fsys, data := newMem(1), payload(2, 200)
		write(t, fsys, "a", payload(1, 10), data, 5, 64)
		n := fail
		fsys.SetHook(func(vfs.Op) error {
			if n--; n == 0 {
				return errDisk
			}
			return nil
		})
		names, err := List(fsys, testDir)
		if err == nil && len(names) == 1 {
			var r *Reader
			if r, err = Open(fsys, testDir, "a"); err == nil {
				_, err = readPiece(r, data, 0, len(data))
				if err != nil {
					if o, err := readPiece(r, data, 0, len(data)); o != correct {
						t.Errorf("operation %d failed, then: %s, %v", fail, outcomeNames[o], err)
					}
				}
				_ = r.Close() // nothing was written
			}
		}
		if fsys.OpenFiles() != 0 {
			t.Errorf("operation %d failed, and %d files are open", fail, fsys.OpenFiles())
		}
		if n > 0 { // nothing failed
			if fail < 6 || err != nil {
				t.Errorf("only %d operations, %v", fail, err)
			}
			return
		}
		if !errors.Is(err, errDisk) || typed(err) == refused || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("operation %d failed: %v", fail, err)
		}
	}
}
