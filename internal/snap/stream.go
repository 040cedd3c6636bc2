package snap

import (
	"encoding/binary"
	"fmt"
	"io"
)

// This file writes and reads a snapshot as a stream, from its first byte to its
// last: into a file (Writer), or over a pipe, which has neither a name nor a
// length that could be asked for.

// Encoder turns a header and a payload into the bytes of a snapshot and writes
// them to an io.Writer. It may be used by one goroutine at a time. Without
// Finish the bytes are no snapshot, and every reader says so.
type Encoder struct {
	w     io.Writer
	salt  uint64
	block []byte // the block that gathers: room for its checksum, then data, up to its capacity
	off   int64  // where that block goes
	end   end
	err   error // why nothing more is accepted
}

// NewEncoder begins a snapshot with a header of at most MaxHeaderBytes. salt is
// random: it tells this snapshot's blocks from those of others. The error is
// w's.
func NewEncoder(w io.Writer, header []byte, salt uint64) (*Encoder, error) {
	return newEncoder(w, header, salt, blockSize)
}

func newEncoder(w io.Writer, header []byte, salt uint64, blockSize int) (*Encoder, error) {
	e := &Encoder{w: w, salt: salt, block: make([]byte, sumSize, sumSize+blockSize)}
	if len(header) > MaxHeaderBytes {
		e.err = fmt.Errorf("snap: a header of %d bytes: at most %d are kept; put the rest into the payload", len(header), MaxHeaderBytes)
		return e, e.err
	}
	h := head{version: formatVersion, salt: salt, blockSize: uint32(blockSize), header: uint32(len(header)), headerCRC: checksum(0, header)}
	first := h.encode()
	e.end.sums = checksum(0, first[8:12])
	return e, e.put(append(first, header...))
}

func (e *Encoder) put(p []byte) error {
	n, err := e.w.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	e.off += int64(n)
	e.err = err
	return err
}

// putBlock writes the block that has gathered.
func (e *Encoder) putBlock() error {
	sum := e.block[:sumSize]
	binary.LittleEndian.PutUint32(sum, checksum(placed(e.salt, e.off), e.block[sumSize:]))
	e.end.sums = checksum(e.end.sums, sum)
	e.end.blocks++
	err := e.put(e.block)
	e.block = sum
	return err
}

// Write adds to the payload. It gathers blocks and writes whole ones. After an
// error, which is the underlying writer's, every further call returns it.
func (e *Encoder) Write(p []byte) (int, error) {
	if e.err != nil {
		return 0, e.err
	}
	for n := 0; n < len(p); {
		k := min(len(p)-n, cap(e.block)-len(e.block))
		e.block = append(e.block, p[n:n+k]...)
		n += k
		e.end.size += uint64(k)
		if len(e.block) == cap(e.block) {
			if err := e.putBlock(); err != nil {
				return n, err
			}
		}
	}
	return len(p), nil
}

// Size returns how much payload has been written so far, in bytes.
func (e *Encoder) Size() int64 { return int64(e.end.size) }

// Finish writes what has gathered and the end block. It is called once.
func (e *Encoder) Finish() error {
	if e.err != nil {
		return e.err
	}
	if len(e.block) > sumSize {
		if err := e.putBlock(); err != nil {
			return err
		}
	}
	return e.put(e.end.encode(e.salt, e.off))
}

// Decoder reads a snapshot in order from an io.Reader, and gives out no byte of
// a block before it has found its checksum right. It may be used by one
// goroutine at a time.
type Decoder struct {
	r      io.Reader
	name   string // for errors
	head   head
	header []byte

	buf   []byte // what was read and is not yet taken apart: up to a block, an end block and one byte that shows that there is more
	off   int64  // of buf in the stream
	data  []byte // of the current block, checked, not yet given out
	read  end    // what the end block should say of what was read so far
	ended bool   // all was read and checked
	err   error
}

// NewDecoder reads the head and the header of a snapshot. name stands for the
// stream in errors. Damage gives a *CorruptError, a newer format a
// *VersionError; other errors are r's.
func NewDecoder(r io.Reader, name string) (*Decoder, error) {
	d := &Decoder{r: r, name: name}
	b, err := d.fill(headSize)
	if err != nil {
		return nil, err
	}
	h, err := checkHead(b, name)
	if err != nil {
		return nil, err
	}
	d.head = h
	d.read.sums = checksum(0, b[8:12])
	d.off = headSize
	if d.header, err = d.fill(int(h.header)); err != nil {
		return nil, err
	}
	if err := checkHeader(&h, d.header, name); err != nil {
		return nil, err
	}
	d.off += int64(h.header)
	d.buf = make([]byte, 0, sumSize+int(h.blockSize)+endSize+1)
	return d, nil
}

// fill reads n bytes, all of which must be there.
func (d *Decoder) fill(n int) ([]byte, error) {
	b := make([]byte, n)
	k, err := io.ReadFull(d.r, b)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return nil, &CorruptError{d.name, d.off + int64(k), fmt.Sprintf("the end, and %d more bytes should be there", n-k)}
	}
	return b, d.readError(err)
}

func (d *Decoder) readError(err error) error {
	if err != nil {
		return fmt.Errorf("snap: read %s: %w", d.name, err)
	}
	return nil
}

// Header returns what NewEncoder was given. It must not be changed.
func (d *Decoder) Header() []byte { return d.header }

// Offset returns how many bytes of the stream were read and found right.
func (d *Decoder) Offset() int64 { return d.off }

// Read reads payload. It returns io.EOF only behind a valid end block that is
// the end of the stream, so a stream that is cut off anywhere is a
// *CorruptError. Other errors are the underlying reader's.
func (d *Decoder) Read(p []byte) (int, error) {
	for len(d.data) == 0 && d.err == nil {
		d.err = d.next()
	}
	if len(d.data) == 0 {
		return 0, d.err
	}
	n := copy(p, d.data)
	d.data = d.data[n:]
	return n, nil
}

// next checks the next block, and with the last one the end block. Whether it is
// the last one, and of what length, shows only in what follows: the last 32
// bytes of the stream are the end block.
func (d *Decoder) next() error {
	if d.ended {
		return io.EOF
	}
	kept := len(d.buf)
	n, err := io.ReadFull(d.r, d.buf[kept:cap(d.buf)])
	d.buf = d.buf[:kept+n]
	d.ended = err == io.EOF || err == io.ErrUnexpectedEOF
	if err != nil && !d.ended {
		return d.readError(err)
	}
	size := sumSize + int(d.head.blockSize)
	var e end
	if d.ended {
		if size = len(d.buf) - endSize; size < 0 {
			return &CorruptError{d.name, d.off + int64(len(d.buf)), "the end, and no end block before it"}
		}
		var wrong string
		if e, wrong = decodeEnd(d.buf[size:], d.head.salt, d.off+int64(size)); wrong != "" {
			return &CorruptError{d.name, d.off + int64(size), wrong}
		}
	}
	if size > 0 {
		if err := d.checkBlock(d.buf[:size]); err != nil {
			return err
		}
		d.data = append(d.data[:0], d.buf[sumSize:size]...)
	}
	d.off += int64(size)
	if d.ended {
		d.off += endSize
		return d.checkEnd(e)
	}
	d.buf = append(d.buf[:0], d.buf[size:]...)
	return nil
}

func (d *Decoder) checkBlock(b []byte) error {
	if len(b) <= sumSize {
		return &CorruptError{d.name, d.off, fmt.Sprintf("%d bytes, too few for a block", len(b))}
	}
	if got, want := checksum(placed(d.head.salt, d.off), b[sumSize:]), binary.LittleEndian.Uint32(b); got != want {
		return &CorruptError{d.name, d.off, fmt.Sprintf("block %d, whose checksum is %08x and says %08x", d.read.blocks, got, want)}
	}
	d.read.sums = checksum(d.read.sums, b[:sumSize])
	d.read.blocks++
	d.read.size += uint64(len(b) - sumSize)
	return nil
}

func (d *Decoder) checkEnd(e end) error {
	if e != d.read {
		d.data = nil
		return &CorruptError{d.name, d.off - endSize, fmt.Sprintf("an end block for %d bytes in %d blocks (%08x), and %d bytes in %d blocks (%08x) before it",
			e.size, e.blocks, e.sums, d.read.size, d.read.blocks, d.read.sums)}
	}
	return nil
}
