package wal

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"example.com/raft/internal/vfs"
)

// segment is one file of the log.
type segment struct {
	header segmentHeader
	name   string // in the directory
	file   vfs.File
	off    int64 // where the next batch goes; owned by the writer

	// Guarded by Log.mu.
	start   uint64       // stream position of the first record
	batches []batchPlace // the durable batches that hold records, in order
	used    bool         // its first batch is durable
	refs    int          // readers
}

// batchPlace says where the records of a batch are.
type batchPlace struct {
	pos uint64 // stream position of the first
	off int64  // its offset in the file
}

// fits reports whether a batch goes in, together with a seal after it and the
// final seal.
func (s *segment) fits(space int64) bool { return s.off+space+2*blockSize <= s.header.size }

const (
	segmentSuffix = ".wal"
	spareSuffix   = ".spare"
)

func fileName(number uint64, suffix string) string { return fmt.Sprintf("%016x%s", number, suffix) }

// parseName is the inverse of fileName.
func parseName(name, suffix string) (number uint64, ok bool) {
	digits, ok := strings.CutSuffix(name, suffix)
	if !ok || len(digits) != 16 {
		return 0, false
	}
	number, err := strconv.ParseUint(digits, 16, 64)
	return number, err == nil && fileName(number, suffix) == name
}

func (l *Log) path(name string) string { return filepath.Join(l.o.Dir, name) }

// roll makes the next segment current, with room for a batch of the given
// space. A segment that holds nothing and is too small is replaced instead,
// unless the next one will do.
func (l *Log) roll(space int64) error {
	l.tendSem <- struct{}{}
	defer func() { <-l.tendSem }()
	old, seg := l.cur, l.next
	number := old.header.number + 1
	ready := seg != nil && seg.fits(space)
	replace := old.off == blockSize && !(ready && old.fits(blocks(batchHeaderSize+l.carry.size())))
	if replace {
		number--
	}
	if replace || !ready {
		var err error
		seg, err = l.prepare(segmentHeader{number: number}, space, true, nil)
		if err != nil {
			return err // nothing was written: if the disk is full, Flush may be called again
		}
	}
	if !replace {
		// The seal is synced before a byte of the next segment is written, and
		// the next segment's name before the seal.
		if err := l.leave(old); err != nil {
			return errors.Join(err, seg.file.Close())
		}
		if l.next != nil && l.next != seg { // its name has gone to seg
			_ = l.next.file.Close()
		}
		l.setNext(nil)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	seg.start = l.writing.start
	old.used = old.used || old.off > blockSize // leave may have written its first batch
	if replace {
		l.segs[len(l.segs)-1] = seg
		_ = old.file.Close() // without a name now, and never written
	} else {
		l.segs = append(l.segs, seg)
	}
	l.cur, l.half, l.curFree = seg, false, seg.free()
	return nil
}

// leave ends a segment. Every segment begins with what is carried, also one that
// was left because its first batch was too large for it: it may be the oldest
// one some day.
func (l *Log) leave(seg *segment) error {
	if body, heads := l.carry.encode(); seg.off == blockSize && len(body) > 0 {
		block := append(make([]byte, batchHeaderSize), body...)
		if err := l.put(seg, block, batchHeader{carried: uint32(len(body)), carriedCRC: heads}); err != nil {
			return err
		}
	}
	return l.seal(seg, flagSeal|flagFinal)
}

// prepare makes a segment that is ready for its first batch, or takes the
// place of the one with its number: filled, its header synced, then named, the
// name synced. write, if given, adds batches before it gets its name. If urgent,
// it may be the reserve. The caller holds tendSem, or is alone.
func (l *Log) prepare(h segmentHeader, space int64, urgent bool, write func(*segment) error) (*segment, error) {
	if l.dirErr != nil {
		return nil, l.dirErr
	}
	want := l.wantSize()
	if h.recovered { // not a sign of growth
		want = int64(l.o.MinSegmentBytes)
	}
	seg, err := l.filled(max(want, space+3*blockSize), space, urgent)
	if err != nil {
		if err = fullOr(err); errors.Is(err, ErrDiskFull) {
			l.noteFull(err)
		}
		return nil, err
	}
	h.version, h.tag, h.size, h.salt = formatVersion, l.o.Tag, seg.header.size, l.o.Rand()
	seg.header, seg.off = h, blockSize
	_, err = seg.file.WriteAt(h.encode(), 0)
	if err == nil && write != nil {
		err = write(seg)
	}
	if err == nil {
		err = seg.file.Sync()
	}
	if err == nil {
		err = l.rename(seg, fileName(h.number, segmentSuffix))
	}
	if l.dirErr != nil {
		return nil, errors.Join(l.dirErr, seg.file.Close())
	}
	if err != nil {
		if err = fullOr(l.discard(seg, fmt.Errorf("prepare %s: %w", seg.name, err))); errors.Is(err, ErrDiskFull) {
			l.noteFull(err)
		}
		return nil, err
	}
	return seg, nil
}

// rename gives a file another name, durably. One that finds no space, which the
// directory may need, has changed nothing; after any other error nobody knows
// what the directory holds, which dirErr says. That includes a sync that finds no
// space: the next one may succeed without having written what this one could not.
func (l *Log) rename(seg *segment, name string) error {
	err := l.o.FS.Rename(l.path(seg.name), l.path(name))
	if vfs.IsNoSpace(err) {
		return err
	}
	seg.name = name
	if err == nil {
		err = l.o.FS.SyncDir(l.o.Dir)
	}
	if err != nil {
		l.dirErr = fmt.Errorf("name %s: %w", name, err)
	}
	return l.dirErr
}

// discard gives up a file under a spare name, and returns why.
func (l *Log) discard(seg *segment, why error) error {
	_ = seg.file.Close()
	_ = l.o.FS.Remove(l.path(seg.name)) // if it stays, Open removes or recycles it
	return why
}

// wantSize is how long the next segment should be, in bytes.
func (l *Log) wantSize() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.segs) == 0 {
		return int64(l.o.MinSegmentBytes)
	}
	size := 2 * l.segs[len(l.segs)-1].header.size
	return min(max(size, int64(l.o.MinSegmentBytes)), int64(l.o.MaxSegmentBytes))
}

// newFile returns a new file under a spare name, full of zeros and synced.
func (l *Log) newFile(size int64) (*segment, error) {
	l.spareID++
	name := fileName(l.spareID, spareSuffix)
	f, err := l.o.FS.Create(l.path(name))
	if err != nil {
		return nil, fmt.Errorf("create a segment: %w", err)
	}
	seg := &segment{name: name, file: f, header: segmentHeader{size: size}}
	if err := l.zeroFill(seg); err != nil {
		return nil, l.discard(seg, fmt.Errorf("fill %s with zeros: %w", name, err))
	}
	return seg, nil
}

// zeroFill really writes zeros: space that is only reserved would make later
// syncs write metadata. It syncs as it goes, because a sync of the writer waits
// until the disk has written them, and gives up when the log closes.
func (l *Log) zeroFill(seg *segment) error {
	zeros := make([]byte, min(seg.header.size, 256<<10))
	synced := int64(0)
	for off := int64(0); off < seg.header.size; {
		n := min(int64(len(zeros)), seg.header.size-off)
		if _, err := seg.file.WriteAt(zeros[:n], off); err != nil {
			return err
		}
		off += n
		if off-synced >= l.fillPiece(seg.header.size-off, seg.header.size) || off == seg.header.size {
			if err := seg.file.Sync(); err != nil {
				return err
			}
			synced = off
		}
		select {
		case <-l.quit:
			return ErrClosed
		default:
		}
	}
	return nil
}

// fillPiece is how many bytes of zeros are written between syncs, while left of a
// segment's size are still to be. Small pieces delay the writer less, and large
// ones are done sooner: so they are small as long as less is left of this segment
// than of the half of the current one that was free when it was begun.
func (l *Log) fillPiece(left, size int64) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wanted == 0 && len(l.segs) > 0 {
		half := l.segs[len(l.segs)-1].header.size / 2
		if float64(left)/float64(size) < float64(l.curFree)/float64(half) {
			return 512 << 10
		}
	}
	return 4 << 20
}

// Release says that records below an LSN will not be needed again. A segment
// that holds only such records is recycled or removed once the one after it
// has a durable batch, and nobody reads it.
func (l *Log) Release(before LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if before > 0 && uint64(before)-1 > l.release {
		l.release = min(uint64(before)-1, l.durable)
		if l.releasableLocked() {
			l.wakeTend()
		}
	}
}

// releasableLocked reports whether the oldest segment can go. mu is held.
func (l *Log) releasableLocked() bool {
	return len(l.segs) > 1 && l.segs[1].used && l.segs[1].start <= l.release && l.segs[0].refs == 0
}

// wakeTend wakes the goroutine. It never blocks.
func (l *Log) wakeTend() {
	select {
	case l.kick <- struct{}{}:
	default: // it has been woken already
	}
}

// reclaim recycles or removes released segments, the oldest first, each
// durably before the next: a gap in the numbers is taken for a lost file.
func (l *Log) reclaim() (n int, err error) {
	for ; l.dirErr == nil; n++ {
		seg := l.takeReleased()
		if seg == nil {
			return n, nil
		}
		var err error
		if len(l.spares) < l.o.MaxSpares && l.recyclable(seg) {
			l.spareID++
			spare := &segment{header: seg.header, file: seg.file, name: fileName(l.spareID, spareSuffix)}
			err = l.o.FS.Rename(l.path(seg.name), l.path(spare.name))
			switch {
			case err == nil:
				l.spares = append(l.spares, spare)
				l.noteSpares()
			case vfs.IsNoSpace(err): // the directory has no room for the name
				err = errors.Join(seg.file.Close(), l.o.FS.Remove(l.path(seg.name)))
			default:
				err = errors.Join(err, seg.file.Close())
			}
		} else {
			err = errors.Join(seg.file.Close(), l.o.FS.Remove(l.path(seg.name)))
		}
		if err == nil {
			err = l.o.FS.SyncDir(l.o.Dir)
		}
		if err != nil {
			l.dirErr = fmt.Errorf("reclaim %s: %w", seg.name, err)
		}
	}
	return n, l.dirErr
}

// takeReleased takes the oldest segment from the list if it can go.
func (l *Log) takeReleased() *segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.releasableLocked() {
		return nil
	}
	seg := l.segs[0]
	l.segs = append([]*segment(nil), l.segs[1:]...)
	return seg
}

// recyclable reports whether a segment is of a size that will be wanted.
func (l *Log) recyclable(seg *segment) bool {
	return seg.header.size >= l.wantSize() && seg.header.size <= int64(l.o.MaxSegmentBytes)
}

func (l *Log) noteSpares() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spareN = len(l.spares)
}
