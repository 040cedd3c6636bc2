package snap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"example.com/raft/internal/vfs"
)

// Reader reads a complete snapshot. Its methods may be called concurrently,
// but for Close, which comes last.
type Reader struct {
	file   vfs.File
	name   string // path
	head   head
	end    end
	header []byte
	start  int64 // of the first block in the file
	endOff int64 // of the end block

	// busy is a semaphore that owns the rest. It is held while a block is read.
	busy   chan struct{}
	block  []byte // checksum and data of a block, checked
	loaded int64  // which one; -1: none
	next   int64  // sums covers the blocks before this one
	sums   uint32
}

// Open opens a snapshot and checks its header and its end block. Damage gives
// a *CorruptError, a newer format a *VersionError, a missing file an error that
// matches fs.ErrNotExist.
func Open(fs vfs.FS, dir, name string) (*Reader, error) {
	path, err := pathOf(dir, name)
	if err != nil {
		return nil, err
	}
	f, err := fs.Open(path)
	if err != nil {
		return nil, fmt.Errorf("snap: open a snapshot: %w", err)
	}
	r := &Reader{file: f, name: path, busy: make(chan struct{}, 1), loaded: -1}
	if err := r.open(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return r, nil
}

func (r *Reader) corrupt(off int64, format string, args ...any) error {
	return &CorruptError{File: r.name, Offset: off, Found: fmt.Sprintf(format, args...)}
}

// read fills p from the file.
func (r *Reader) read(p []byte, off int64) error {
	n, err := r.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		return r.corrupt(off+int64(n), "the end of the file, and %d more bytes should be there", len(p)-n)
	}
	return fmt.Errorf("snap: read %s: %w", r.name, err)
}

func (r *Reader) open() error {
	size, err := r.file.Size()
	if err != nil {
		return fmt.Errorf("snap: ask for the size of %s: %w", r.name, err)
	}
	if err := r.readHead(size); err != nil {
		return err
	}
	var b [endSize]byte
	if err := r.read(b[:], r.endOff); err != nil {
		return err
	}
	e, wrong := decodeEnd(b[:], r.head.salt, r.endOff)
	if wrong != "" {
		return r.corrupt(r.endOff, "%s", wrong)
	}
	// No term of this sum can overflow once both are below the file's size.
	bs := uint64(r.head.blockSize)
	if e.size > uint64(size) || e.blocks != (e.size+bs-1)/bs || r.start+int64(e.blocks)*sumSize+int64(e.size) != r.endOff {
		return r.corrupt(r.endOff, "an end block for %d bytes in %d blocks of %d, and %d bytes of blocks", e.size, e.blocks, bs, r.endOff-r.start)
	}
	if e.blocks == 0 && e.sums != r.sums { // of others, load checks it
		return r.corrupt(r.endOff, "an end block of another file")
	}
	r.end = e
	return nil
}

// readHead reads and checks what stands before the blocks of a file of the
// given size.
func (r *Reader) readHead(size int64) error {
	var b [headSize]byte
	if err := r.read(b[:], 0); err != nil {
		return err
	}
	h, err := checkHead(b[:], r.name)
	if err != nil {
		return err
	}
	r.start, r.endOff = headSize+int64(h.header), size-endSize
	if r.endOff < r.start {
		return r.corrupt(size, "the end of the file, which is too short for its header and an end block")
	}
	r.header = make([]byte, h.header)
	if err := r.read(r.header, headSize); err != nil {
		return err
	}
	if err := checkHeader(&h, r.header, r.name); err != nil {
		return err
	}
	r.head, r.sums = h, checksum(0, b[8:12])
	return nil
}

// Header returns what Create was given. It must not be changed.
func (r *Reader) Header() []byte { return r.header }

// Size returns the length of the payload in bytes.
func (r *Reader) Size() int64 { return int64(r.end.size) }

// ReadAt reads payload, as io.ReaderAt says. No byte is given out before the
// checksum of its block is found right; damage gives a *CorruptError, and then
// the bytes before the damaged block are right. Reading in order, in pieces of
// any size, reads each block once.
func (r *Reader) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("snap: read %s at the negative offset %d", r.name, off)
	}
	r.busy <- struct{}{}
	defer func() { <-r.busy }()
	for n < len(p) {
		if off >= r.Size() {
			return n, io.EOF
		}
		bs := int64(r.head.blockSize)
		if err := r.load(off / bs); err != nil {
			return n, err
		}
		k := copy(p[n:], r.block[sumSize+off%bs:])
		n, off = n+k, off+int64(k)
	}
	return n, nil
}

// load reads block i and checks it. The caller holds busy.
func (r *Reader) load(i int64) error {
	if r.loaded == i {
		return nil
	}
	bs := int64(r.head.blockSize)
	if r.block == nil {
		r.block = make([]byte, sumSize+min(bs, r.Size()))
	}
	r.loaded = -1
	at := r.start + i*(sumSize+bs)
	r.block = r.block[:sumSize+min(bs, r.Size()-i*bs)]
	if err := r.read(r.block, at); err != nil {
		return err
	}
	sum, data := r.block[:sumSize], r.block[sumSize:]
	if got, want := checksum(placed(r.head.salt, at), data), binary.LittleEndian.Uint32(sum); got != want {
		return r.corrupt(at, "block %d, whose checksum is %08x and says %08x", i, got, want)
	}
	if i == r.next {
		sums := checksum(r.sums, sum)
		if i+1 == int64(r.end.blocks) && sums != r.end.sums {
			return r.corrupt(at, "blocks whose checksums together give %08x, and the end block says %08x", sums, r.end.sums)
		}
		r.next, r.sums = i+1, sums
	}
	r.loaded = i
	return nil
}

// Close closes the file.
func (r *Reader) Close() error { return r.file.Close() }
