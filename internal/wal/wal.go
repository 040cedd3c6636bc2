// Package wal is a write-ahead log of records in a directory of segment files.
// It knows records, not Raft. docs/FORMAT.md specifies what is on disk.
//
// The log is a buffer and Flush: Append copies records into memory, Flush
// makes everything appended so far durable with one write and one sync. With
// Options.PrepareInline no goroutine is used, and equal calls on equal file
// systems give equal bytes.
package wal

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"example.com/raft/internal/vfs"
)

// Record is what the log holds.
type Record struct {
	Kind  byte
	Group uint32   // which of several users of one log it belongs to
	Data  []byte   // at most 1 GiB with Parts
	Parts [][]byte // for Append only: more data, after Data, so that the caller need not join it
}

func (r *Record) size() int {
	n := len(r.Data)
	for _, p := range r.Parts {
		n += len(p)
	}
	return n
}

// LSN is the position of a record in this run of the log: positive and
// strictly growing. It is computed anew by Open, and not stored. A record is
// durable exactly if its LSN is at most Durable().
type LSN uint64

// Options are the parameters of Open. FS and Dir are required.
type Options struct {
	FS  vfs.FS
	Dir string // created if missing; the log owns it
	// Tag names the directory. It is written to each segment, and a segment
	// with another tag is refused.
	Tag [16]byte
	// Begun says that records were made durable here before. A log that holds none
	// is refused then: it was deleted, or is somewhere else.
	Begun bool
	// MinSegmentBytes is the size of the first segment, 1 MiB if zero. Each new
	// segment is twice as long as the one before, up to MaxSegmentBytes, 64 MiB
	// if zero. Both are multiples of 4096, at least 16384. A segment is made
	// longer where its first batch needs it.
	MinSegmentBytes, MaxSegmentBytes int
	// MaxSpares is how many released segments are kept for recycling; 4 if
	// zero, none if negative.
	MaxSpares int
	// Carry lists kinds of records of which only the latest per group counts.
	// Each new segment opens with a copy of the latest ones, as of its start,
	// so that Release never loses one.
	Carry []byte
	// Rand is the source of salts; crypto/rand if nil. It may be called by
	// several goroutines, one at a time.
	Rand func() uint64
	// ReserveBytes is the size of the file that keeps small records writable on a
	// full disk: MinSegmentBytes if zero; no reserve if negative.
	ReserveBytes int
	// OnSpace, if given, is called when the disk has become full, when it has
	// space again, and when there is more room than before. It must neither block
	// nor call the log.
	OnSpace func()
	// OnRead, if given, is called by Open after each segment that it has read, with
	// the bytes read so far, of how many.
	OnRead func(done, total int64)
	// PrepareInline is for deterministic callers: no goroutine is started, and
	// segments are prepared and reclaimed in Prepare, or where they are missed.
	PrepareInline bool
}

// Log is a write-ahead log. All its methods may be called concurrently.
//
// Lock order: busy, then tendSem, then mu. mu is never held across I/O.
type Log struct {
	o    Options
	lock io.Closer // of the directory

	mu      sync.Mutex
	cond    *sync.Cond // on mu: busy, err or a segment's refs has changed
	err     error      // why nothing more is accepted
	closed  bool       // Close has begun
	busy    bool       // somebody writes; that goroutine owns cur, last, seq, unsealed and carry
	stage   *buffer    // what is appended next goes here
	writing *buffer    // what is being written, or nil
	free    *buffer    // the third state of the two buffers
	end     uint64     // stream position after the last staged record
	lastLSN LSN        // of the last staged record
	durable uint64     // stream position up to which all is durable
	segs    []*segment // in order, at least one; the last is cur
	release uint64     // stream position below which records may go
	half    bool       // the current segment is more than half full
	spareN  int        // len(spares), for Status
	tendErr error      // the last error of preparing or reclaiming
	full    error      // why no segment could be prepared, if that was lack of space
	wanted  int64      // bytes of records that somebody wants room for

	// What the next batch may take in the current segment, and in the next one
	// (0: there is none), and the size of what is carried there.
	curFree, nextFree, carried int64

	cur      *segment
	last     link // the last batch
	seq      uint64
	unsealed bool // the last batch holds records and nothing after it proves it
	carry    carry

	tendSem chan struct{} // a semaphore that owns the rest
	next    *segment      // prepared ahead, or nil
	spares  []*segment    // files to recycle, under spare names
	spareID uint64        // for names of spares
	reserve *segment      // becomes a segment when no other can be had, or nil
	dirErr  error         // a failure after which the directory's state is unknown

	kick, quit chan struct{}
	wg         sync.WaitGroup
	closeErr   error
	closeDone  chan struct{}
}

// buffer holds encoded records behind room for a batch header.
type buffer struct {
	b       []byte
	heads   uint32 // checksum of the heads of the records
	start   uint64 // stream position of the first record
	carries bool   // holds a record of a carried kind
}

func (b *buffer) records() []byte { return b.b[batchHeaderSize:] }

// maxKeptBuffer is the largest buffer that is kept for reuse, in bytes.
const maxKeptBuffer = 32 << 20

func (b *buffer) reset() {
	if cap(b.b) > maxKeptBuffer || cap(b.b) < batchHeaderSize {
		b.b = make([]byte, batchHeaderSize, blockSize)
	}
	*b = buffer{b: b.b[:batchHeaderSize]}
}

func (o *Options) defaults() error {
	if o.FS == nil || o.Dir == "" {
		return errors.New("wal: Options.FS and Options.Dir must be set")
	}
	if o.MinSegmentBytes == 0 {
		o.MinSegmentBytes = 1 << 20
	}
	if o.MaxSegmentBytes == 0 {
		o.MaxSegmentBytes = max(64<<20, o.MinSegmentBytes)
	}
	for _, n := range []int{o.MinSegmentBytes, o.MaxSegmentBytes} {
		if n < 4*blockSize || n%blockSize != 0 {
			return fmt.Errorf("wal: a segment size of %d bytes: it must be a multiple of %d and at least %d", n, blockSize, 4*blockSize)
		}
	}
	if o.MaxSegmentBytes < o.MinSegmentBytes {
		return fmt.Errorf("wal: MaxSegmentBytes %d is below MinSegmentBytes %d", o.MaxSegmentBytes, o.MinSegmentBytes)
	}
	if o.MaxSpares == 0 {
		o.MaxSpares = 4
	}
	if o.ReserveBytes == 0 {
		o.ReserveBytes = o.MinSegmentBytes
	}
	if o.ReserveBytes > 0 && (o.ReserveBytes < 4*blockSize || o.ReserveBytes%blockSize != 0) {
		return fmt.Errorf("wal: ReserveBytes %d: it must be a multiple of %d and at least %d", o.ReserveBytes, blockSize, 4*blockSize)
	}
	if o.Rand == nil {
		o.Rand = func() uint64 {
			var b [8]byte
			_, _ = rand.Read(b[:]) // never fails; see its documentation
			return binary.LittleEndian.Uint64(b[:])
		}
	}
	return nil
}

// Open opens the log in a directory, or makes a new one, and calls replay for
// what it holds, in order: first the carried records with which the oldest
// segment opens, with LSN 0, then every record. Data is valid only during the
// call. An error of replay ends Open with that error. ctx bounds the recovery.
//
// If Open fails because of what it found (CorruptError, VersionError,
// TagError) nothing on disk has changed. When it returns without an error,
// everything that was replayed is durable.
func Open(ctx context.Context, o Options, replay func(LSN, Record) error) (*Log, error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	l := &Log{
		o:         o,
		stage:     &buffer{},
		free:      &buffer{},
		carry:     newCarry(o.Carry),
		tendSem:   make(chan struct{}, 1),
		kick:      make(chan struct{}, 1),
		quit:      make(chan struct{}),
		closeDone: make(chan struct{}),
	}
	l.cond = sync.NewCond(&l.mu)
	l.stage.reset()
	l.free.reset()
	if _, err := o.FS.Stat(o.Dir); o.Begun && errors.Is(err, fs.ErrNotExist) {
		return nil, lost(o.Dir)
	}
	if err := o.FS.MkdirAll(o.Dir); err != nil {
		return nil, fmt.Errorf("wal: create the log's directory: %w", err)
	}
	lock, err := o.FS.Lock(l.path("lock"))
	if err != nil {
		return nil, fmt.Errorf("wal: %s is in use: %w", o.Dir, err)
	}
	l.lock = lock
	if err := l.recover(ctx, replay); err != nil {
		return nil, errors.Join(err, l.closeFiles())
	}
	if !o.PrepareInline {
		l.wg.Add(1)
		go l.runTend()
		l.wakeTend()
	}
	return l, nil
}

// Append copies records to the log's buffer, in order and for one batch, and
// returns the LSN of the last. It does no I/O and does not wait for any. After
// the log has failed or closed nothing is kept, and Flush says why.
func (l *Log) Append(recs ...Record) LSN {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range recs {
		l.appendLocked(&recs[i])
	}
	return l.lastLSN
}

func (l *Log) appendLocked(r *Record) {
	size := r.size()
	b := l.stage
	if l.err == nil && len(b.b)+recordHeadSize+size > maxBatchBytes {
		l.fail(fmt.Errorf("%d bytes are staged and a record of %d comes: a batch holds at most %d; flush earlier", len(b.records()), size, maxBatchBytes))
	}
	if l.err != nil {
		l.lastLSN = LSN(l.end + 1) // never durable
		return
	}
	b.b = grow(b.b, recordHeadSize+size)
	b.b, b.heads = appendRecord(b.b, b.heads, r, size)
	b.carries = b.carries || l.carry.wants(r.Kind)
	l.lastLSN = LSN(l.end + 1)
	l.end = b.start + uint64(len(b.records()))
}

// grow makes room for n bytes and for the padding of a batch behind them, so
// that padding never moves the buffer.
func grow(b []byte, n int) []byte {
	need := len(b) + n + blockSize
	if need <= cap(b) {
		return b
	}
	c := make([]byte, len(b), max(need, 2*cap(b)))
	copy(c, b)
	return c
}

// Flush returns when everything appended before the call is durable. Callers
// that come while one writes wait for it and are then served together. After a
// failed write or sync every call returns an error that matches ErrFailed. One
// that matches ErrDiskFull and not ErrFailed says that nothing was written, and
// that what was appended is kept: the call may be repeated.
func (l *Log) Flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for target := l.end; l.err == nil && l.durable < target; {
		if l.busy {
			l.cond.Wait()
			continue
		}
		if err := l.flushLocked(); errors.Is(err, ErrDiskFull) {
			return err
		}
	}
	return l.err
}

// flushLocked writes what is staged. mu is released meanwhile.
func (l *Log) flushLocked() error {
	b := l.stage
	l.stage, l.free, l.writing = l.free, nil, b
	l.stage.start = l.end
	seg, at, err := l.exclusive(func() (*segment, int64, error) { return l.writeRecords(b) })
	if err == nil {
		l.durable = b.start + uint64(len(b.records()))
		seg.batches = append(seg.batches, batchPlace{pos: b.start, off: at})
	}
	if errors.Is(err, ErrDiskFull) {
		b, l.stage = l.stage, b.join(l.stage)
	}
	b.reset()
	l.writing, l.free = nil, b
	l.cond.Broadcast()
	return err
}

// join adds the records of the buffer that follows.
func (b *buffer) join(later *buffer) *buffer {
	_ = eachRecord(later.records(), func(at int, _ Record) error {
		b.heads = checksum(b.heads, later.records()[at:at+recordHeadSize])
		return nil
	})
	b.b = append(b.b, later.records()...)
	b.carries = b.carries || later.carries
	return b
}

// exclusive runs f, which does I/O, without mu but as the only writer. It is
// called with mu held and busy unset, and returns so, also when f panics: the
// log has failed then.
func (l *Log) exclusive(f func() (*segment, int64, error)) (seg *segment, at int64, err error) {
	l.busy = true
	l.mu.Unlock()
	err = errPanic
	defer func() {
		l.mu.Lock()
		l.busy = false
		switch {
		case err == nil:
			l.wrote(seg)
		case !errors.Is(err, ErrDiskFull): // which says that nothing was written
			l.fail(err)
		}
		l.cond.Broadcast()
	}()
	return f()
}

var errPanic = errors.New("a write panicked")

// wrote notes that a batch in a segment is durable. mu is held.
func (l *Log) wrote(seg *segment) {
	seg.used = seg.used || seg.off > blockSize
	l.curFree, l.carried = seg.free(), l.carry.size()
	half := seg.off > seg.header.size/2
	if half && !l.half || l.releasableLocked() {
		l.wakeTend()
	}
	l.half = half
}

// fail stops the log for good. mu is held.
func (l *Log) fail(cause error) {
	if l.err == nil {
		l.err = fmt.Errorf("%w: %w", ErrFailed, cause)
	}
}

// writeRecords writes a buffer as the next batch and returns where its records
// are. The caller is the only writer.
func (l *Log) writeRecords(b *buffer) (*segment, int64, error) {
	h := batchHeader{records: uint32(len(b.records())), recordsCRC: b.heads}
	block := b.b
	need := blocks(int64(len(block)))
	if l.cur.off == blockSize || !l.cur.fits(need) {
		carried, heads := l.carry.encode()
		need = blocks(int64(len(carried) + len(block)))
		if !l.cur.fits(need) {
			if err := l.roll(need); err != nil {
				return nil, 0, err
			}
		}
		if len(carried) > 0 {
			h.carried, h.carriedCRC = uint32(len(carried)), heads
			block = append(make([]byte, batchHeaderSize, need), carried...)
			block = append(block, b.records()...)
		}
	}
	at := l.cur.off + batchHeaderSize + int64(h.carried)
	if err := l.put(l.cur, block, h); err != nil {
		return nil, 0, err
	}
	l.unsealed = true
	if b.carries {
		l.carry.take(b.records())
	}
	return l.cur, at, nil
}

// put writes one batch to the end of a segment and syncs it: the one place
// where batches are written. block starts with room for the header.
func (l *Log) put(seg *segment, block []byte, h batchHeader) error {
	if pad := len(block) % blockSize; pad != 0 {
		block = append(block, zeroBlock[:blockSize-pad]...)
	}
	l.seq++
	h.version, h.salt, h.seq, h.prev = formatVersion, seg.header.salt, l.seq, l.last
	crc := h.encode(block, seg.off)
	if _, err := seg.file.WriteAt(block, seg.off); err != nil {
		return fmt.Errorf("write %s: %w", seg.name, err)
	}
	if err := seg.file.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", seg.name, err)
	}
	seg.off += int64(len(block))
	l.last = link{seq: h.seq, crc: crc}
	return nil
}

// Durable returns the position up to which everything is durable.
func (l *Log) Durable() LSN {
	l.mu.Lock()
	defer l.mu.Unlock()
	return LSN(l.durable)
}

// Staged returns how much has been appended and is not durable, in bytes.
func (l *Log) Staged() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int(l.end - l.durable)
}

// Err returns nil, or why the log accepts nothing more.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Seal proves the last batch, if nothing has yet: after that, damage to it is
// told from a torn write. It is meant for a log that has been idle for about
// 100 ms, costs a write and a sync, and does not flush what is staged.
func (l *Log) Seal() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.busy && l.err == nil {
		l.cond.Wait()
	}
	if l.err != nil {
		return l.err
	}
	if l.unsealed {
		l.exclusive(func() (*segment, int64, error) { return l.cur, 0, l.seal(l.cur, flagSeal) })
	}
	return l.err
}

// seal writes a seal, for which every segment keeps room.
func (l *Log) seal(seg *segment, flags byte) error {
	if err := l.put(seg, make([]byte, batchHeaderSize, blockSize), batchHeader{flags: flags}); err != nil {
		return err
	}
	l.unsealed = false
	return nil
}

// Close seals the log, ends its goroutine, waits for a running read, write or
// sync, and closes every file. What was not flushed is dropped. It returns the
// error that stopped the log, if one had. Later calls return the same.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		<-l.closeDone
		return l.closeErr
	}
	l.closed = true
	for l.busy {
		l.cond.Wait()
	}
	if l.err == nil && l.unsealed {
		l.exclusive(func() (*segment, int64, error) { return l.cur, 0, l.seal(l.cur, flagSeal) })
	}
	failure := l.err
	if failure == nil {
		l.err = ErrClosed
	}
	close(l.quit)
	l.cond.Broadcast() // nobody claims room any more
	for l.busy || l.pinned() {
		l.cond.Wait()
	}
	l.mu.Unlock()
	l.wg.Wait()
	l.closeErr = errors.Join(failure, l.closeFiles())
	close(l.closeDone)
	return l.closeErr
}

// pinned reports whether a segment is being read. mu is held.
func (l *Log) pinned() bool {
	for _, seg := range l.segs {
		if seg.refs > 0 {
			return true
		}
	}
	return false
}

// closeFiles closes everything, once nothing runs any more.
func (l *Log) closeFiles() error {
	l.tendSem <- struct{}{} // an inline Prepare may be at work
	defer func() { <-l.tendSem }()
	all := append(append([]*segment(nil), l.segs...), l.spares...)
	for _, seg := range []*segment{l.next, l.reserve} {
		if seg != nil {
			all = append(all, seg)
		}
	}
	var errs []error
	for _, seg := range all {
		errs = append(errs, seg.file.Close())
	}
	l.next, l.reserve, l.spares = nil, nil, nil
	return errors.Join(append(errs, l.lock.Close())...)
}

// Status describes a log.
type Status struct {
	Segments   int   // in use, the current one included
	Bytes      int64 // of these on disk
	Spares     int   // files kept for recycling
	Staged     int   // bytes appended and not durable
	Oldest     LSN   // records below it cannot be read any more
	Durable    LSN
	Err        error // why nothing more is accepted
	Room       int64 // see Log.Room
	Full       error // why no segment could be prepared, if that was lack of space
	PrepareErr error // why the next segment could not be prepared, or an old one reclaimed
}
