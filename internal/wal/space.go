package wal

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"time"

	"example.com/raft/internal/vfs"
)

// This file is about space on disk: what is claimed, what records may count on
// it, and what happens when there is none.
//
// Space is claimed by preparing segments, before anybody writes to them. Room
// says how much may still be appended within what is claimed. A caller that
// keeps to it never makes a Flush wait for a segment, and never fails for lack
// of space: only preparing does, and it is tried again until there is some.
//
// Small records that must be written in any case have the slack that Room leaves
// out, and after it the reserve: a file of its own, filled like a segment, which
// becomes one only when no other can be had.

const (
	// slackBlocks is what Room leaves out: the headers and the padding of the
	// batch being written and of the one after it, a seal, and small records
	// that are appended without asking.
	slackBlocks = 4
	// Preparing is tried again after these times while the disk is full.
	firstRetry, lastRetry = 50 * time.Millisecond, time.Second

	reserveName = "reserve"
)

// free is how many bytes the next batch may take in a segment.
func (s *segment) free() int64 { return s.header.size - s.off - 2*blockSize }

// Room returns how many bytes may still be appended, each record counting 16
// more than its data, and will certainly find space. full says why no further
// segment could be prepared: it matches ErrDiskFull, and is nil again once one
// has been.
func (l *Log) Room() (bytes int64, full error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.roomLocked(), l.full
}

// roomLocked counts from what is durable: whatever was appended since is one
// batch or two. mu is held.
func (l *Log) roomLocked() int64 {
	if l.tendErr != nil && l.full == nil {
		return math.MaxInt64 // nobody is to wait for what will not come: the write that needs it fails
	}
	claimed := max(l.curFree, l.nextFree) - l.carried - slackBlocks*blockSize
	return max(0, claimed-int64(l.end-l.durable))
}

// Want asks for room for n bytes, and returns at once. Options.OnSpace is called
// when there may be.
func (l *Log) Want(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wantLocked(n)
}

func (l *Log) wantLocked(n int64) {
	if l.roomLocked() < n {
		l.wanted = max(l.wanted, n)
		if l.full == nil {
			l.wakeTend()
		}
	}
}

// Claim waits until there is room for n bytes, or there can't be: the error
// matches ErrDiskFull then, or is why the log accepts nothing more.
func (l *Log) Claim(n int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for tried := false; l.roomLocked() < n; tried = true {
		switch {
		case l.err != nil:
			return l.err
		case l.full != nil:
			return l.full
		case tried && l.o.PrepareInline:
			return fmt.Errorf("wal: %d bytes found no room", n)
		}
		l.wantLocked(n)
		if l.o.PrepareInline {
			l.mu.Unlock()
			_ = l.Prepare() // its error is in full, or the write tells it
			l.mu.Lock()
			continue
		}
		l.cond.Wait()
	}
	return nil
}

// noteFull takes note that a segment could not be prepared for lack of space.
func (l *Log) noteFull(why error) {
	l.mu.Lock()
	news := l.full == nil
	l.full = why
	l.cond.Broadcast()
	l.mu.Unlock()
	if news {
		l.wakeTend()
		l.spaceChanged()
	}
}

func (l *Log) spaceChanged() {
	if l.o.OnSpace != nil {
		l.o.OnSpace()
	}
}

func (l *Log) isFull() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.full
}

func fullOr(err error) error {
	if vfs.IsNoSpace(err) && !errors.Is(err, ErrDiskFull) {
		return fmt.Errorf("%w: %w", ErrDiskFull, err)
	}
	return err
}

// runTend is the log's one goroutine. Open starts it, Close ends it. While the
// disk is full it tries again, after growing pauses.
func (l *Log) runTend() {
	defer l.wg.Done()
	var retry <-chan time.Time
	pause := firstRetry
	for {
		select {
		case <-l.quit:
			return
		case <-l.kick:
			_ = l.tend(false) // Status reports it, and a writer that needs the segment
		case <-retry:
			retry = nil
			_ = l.tend(true)
		}
		switch {
		case l.isFull() == nil:
			retry, pause = nil, firstRetry
		case retry == nil:
			retry, pause = time.After(pause), min(2*pause, lastRetry)
		}
	}
}

// Prepare reclaims what has been released, and prepares the next segment if
// the current one is more than half full, or if Want or Claim needs it, and the
// reserve if there is none. With Options.PrepareInline the caller calls it, best
// after each Flush and Release; otherwise the log does.
func (l *Log) Prepare() error { return l.tend(true) }

// tend is Prepare. Unless try is set, it leaves a full disk alone that has got
// nothing back by reclaiming.
func (l *Log) tend(try bool) error {
	l.tendSem <- struct{}{}
	defer func() { <-l.tendSem }()
	l.mu.Lock()
	err, full, before := l.err, l.full, l.roomLocked()
	l.mu.Unlock()
	if err != nil {
		return err
	}
	reclaimed, err := l.reclaim()
	if full != nil && !try && reclaimed == 0 {
		return err
	}
	if err == nil {
		err = l.prepareReserve()
	}
	if err == nil {
		err = l.prepareNext()
	}
	l.mu.Lock()
	l.tendErr = err
	if err == nil {
		l.full = nil
	}
	changed := (full != nil) != (l.full != nil) || l.roomLocked() > before
	l.cond.Broadcast()
	l.mu.Unlock()
	if changed {
		l.spaceChanged()
	}
	return err
}

// prepareNext prepares the next segment if it is needed. The caller holds tendSem.
func (l *Log) prepareNext() error {
	l.mu.Lock()
	number := l.segs[len(l.segs)-1].header.number + 1
	due := l.half && l.next == nil
	space := int64(0)
	if l.roomLocked() >= l.wanted {
		l.wanted = 0
	} else { // it stays wanted until there is space for it
		due = true
		space = blocks(l.carried+int64(l.end-l.durable)+l.wanted) + slackBlocks*blockSize
	}
	l.mu.Unlock()
	if !due {
		return nil
	}
	seg, err := l.prepare(segmentHeader{number: number}, space, false, nil)
	if err != nil {
		return err
	}
	if l.next != nil { // it was too small, and its name has gone to seg
		_ = l.next.file.Close()
	}
	l.setNext(seg)
	return nil
}

// setNext notes the segment after the current one, or that there is none. The
// caller holds tendSem, or is alone.
func (l *Log) setNext(seg *segment) {
	l.next = seg
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nextFree = 0
	if seg != nil {
		l.nextFree = seg.free()
	}
}

// prepareReserve makes the reserve if it is missing. Its header is written, so
// that Open knows it to be filled. The caller holds tendSem.
func (l *Log) prepareReserve() error {
	if l.reserve != nil || l.o.ReserveBytes < 0 {
		return nil
	}
	seg, err := l.newFile(int64(l.o.ReserveBytes))
	if err == nil {
		seg.header.version, seg.header.tag, seg.header.salt = formatVersion, l.o.Tag, l.o.Rand()
		_, err = seg.file.WriteAt(seg.header.encode(), 0)
		if err == nil {
			err = seg.file.Sync()
		}
		if err == nil {
			err = l.rename(seg, reserveName)
		}
		if l.dirErr != nil {
			return errors.Join(l.dirErr, seg.file.Close())
		}
		if err != nil {
			err = l.discard(seg, fmt.Errorf("prepare the reserve: %w", err))
		}
	}
	if err != nil {
		if err = fullOr(err); errors.Is(err, ErrDiskFull) {
			l.noteFull(err)
		}
		return err
	}
	l.reserve = seg
	return nil
}

// adoptReserve takes over the reserve that is there, or removes one that was
// not finished or has another size.
func (l *Log) adoptReserve() error {
	seg, err := l.openSegment(reserveName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var block [blockSize]byte
	wrong, err := l.readHeader(seg, &block)
	if err == nil && wrong == "" && seg.header.size == int64(l.o.ReserveBytes) {
		l.reserve = seg
		return nil
	}
	if err := errors.Join(seg.file.Close(), l.o.FS.Remove(l.path(reserveName))); err != nil {
		return fmt.Errorf("wal: remove the reserve: %w", err)
	}
	return nil
}

// filled returns a file, all of it written and synced: a recycled one, or a new
// one full of zeros, of the size that is wanted or, on a disk that has no space
// for that, the smallest that a segment has. If even that can't be had, urgent
// takes the reserve if a batch of the given space fits in. The caller holds
// tendSem, or is alone.
func (l *Log) filled(want, space int64, urgent bool) (*segment, error) {
	if seg := l.takeSpare(want); seg != nil {
		return seg, nil
	}
	err := l.isFull()
	if err == nil {
		var seg *segment
		if seg, err = l.newFile(want); !vfs.IsNoSpace(err) {
			return seg, err
		}
	}
	least := max(int64(l.o.MinSegmentBytes), space+3*blockSize)
	if seg := l.takeSpare(least); seg != nil {
		return seg, nil
	}
	if !urgent || l.isFull() == nil { // otherwise it is tried again after a pause, not here
		var seg *segment
		if seg, err = l.newFile(least); !vfs.IsNoSpace(err) {
			return seg, err
		}
	}
	err = fullOr(err)
	if seg := l.reserve; urgent && seg != nil && seg.header.size >= space+3*blockSize {
		l.reserve = nil
		l.noteFull(err)
		return seg, nil
	}
	return nil, err
}

// takeSpare returns a file to recycle of at least the given size, or nil.
func (l *Log) takeSpare(size int64) *segment {
	for i, seg := range l.spares {
		if seg.header.size >= size {
			l.spares = append(l.spares[:i:i], l.spares[i+1:]...)
			l.noteSpares()
			return seg
		}
	}
	return nil
}

// DropSpares removes the files kept for recycling, because something else needs
// the space.
func (l *Log) DropSpares() error {
	l.tendSem <- struct{}{}
	defer func() { <-l.tendSem }()
	var errs []error
	for _, seg := range l.spares {
		errs = append(errs, seg.file.Close(), l.o.FS.Remove(l.path(seg.name)))
	}
	l.spares = nil
	l.noteSpares()
	return errors.Join(errs...)
}
