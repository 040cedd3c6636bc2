package wal

import (
	"fmt"
	"io"
	"slices"
	"sort"
)

// ReadAt returns the record at a position that Append or replay has given. Its
// Data is in buf if that is large enough, and in a new slice otherwise. Many
// readers may run at once; what they read stays until they are done. Data is
// checked against its checksum: rot gives a CorruptError.
func (l *Log) ReadAt(lsn LSN, buf []byte) (Record, error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return Record{}, ErrClosed
	}
	pos := uint64(lsn) - 1
	if lsn == 0 || pos >= l.end {
		l.mu.Unlock()
		return Record{}, ErrNoRecord
	}
	if pos >= l.durable {
		defer l.mu.Unlock()
		return l.readStaged(pos, buf)
	}
	seg, off, limit := l.locate(pos)
	if seg == nil {
		l.mu.Unlock()
		return Record{}, ErrReleased
	}
	seg.refs++
	l.mu.Unlock()
	r, err := l.readFile(seg, off, limit, buf)
	l.mu.Lock()
	defer l.mu.Unlock()
	seg.refs--
	if seg.refs == 0 {
		l.cond.Broadcast()
		if l.releasableLocked() {
			l.wakeTend()
		}
	}
	return r, err
}

// readStaged reads from the buffers. mu is held.
func (l *Log) readStaged(pos uint64, buf []byte) (Record, error) {
	b := l.stage
	if l.writing != nil && pos < b.start {
		b = l.writing
	}
	if l.err != nil {
		return Record{}, l.err
	}
	body := b.records()[pos-b.start:]
	if len(body) < recordHeadSize {
		return Record{}, ErrNoRecord
	}
	h := decodeRecordHead(body)
	if int64(h.size) > int64(len(body)-recordHeadSize) || recordChecksum(body, body[recordHeadSize:][:h.size]) != h.crc {
		return Record{}, ErrNoRecord
	}
	return Record{Kind: h.kind, Group: h.group, Data: append(buf[:0], body[recordHeadSize:][:h.size]...)}, nil
}

// locate finds a durable stream position: its segment, its offset there, and
// the offset at which the records of its batch end. mu is held.
func (l *Log) locate(pos uint64) (seg *segment, off, limit int64) {
	i := sort.Search(len(l.segs), func(i int) bool { return l.segs[i].start > pos }) - 1
	// Segments without records start where the next one does.
	for ; i >= 0; i-- {
		seg = l.segs[i]
		j := sort.Search(len(seg.batches), func(j int) bool { return seg.batches[j].pos > pos }) - 1
		if j < 0 {
			continue
		}
		end := l.durable
		if j+1 < len(seg.batches) {
			end = seg.batches[j+1].pos
		} else if i+1 < len(l.segs) {
			end = l.segs[i+1].start
		}
		b := seg.batches[j]
		return seg, b.off + int64(pos-b.pos), b.off + int64(end-b.pos)
	}
	return nil, 0, 0
}

// readFile reads a record, with one call if it fits into buf.
func (l *Log) readFile(seg *segment, off, limit int64, buf []byte) (Record, error) {
	if limit-off < recordHeadSize {
		return Record{}, ErrNoRecord
	}
	if cap(buf) < recordHeadSize {
		buf = make([]byte, 512)
	}
	buf = buf[:min(int64(cap(buf)), limit-off)]
	if err := readFull(seg, buf, off); err != nil {
		return Record{}, err
	}
	h := decodeRecordHead(buf)
	if int64(h.size) > limit-off-recordHeadSize {
		return Record{}, corrupt(l.path(seg.name), off, "a record of %d bytes where at most %d follow", h.size, limit-off-recordHeadSize)
	}
	total := recordHeadSize + int(h.size)
	if have := len(buf); have < total {
		buf = slices.Grow(buf, total-have)[:total]
		if err := readFull(seg, buf[have:], off+int64(have)); err != nil {
			return Record{}, err
		}
	}
	data := buf[recordHeadSize:total:total]
	if got := recordChecksum(buf, data); got != h.crc {
		return Record{}, corrupt(l.path(seg.name), off, "a record of %d bytes whose checksum is %08x and should be %08x", h.size, got, h.crc)
	}
	return Record{Kind: h.kind, Group: h.group, Data: data}, nil
}

func readFull(seg *segment, p []byte, off int64) error {
	n, err := seg.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("wal: read %s: %w", seg.name, err)
}

// Status returns a description of the log, also after it has failed or closed.
func (l *Log) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Status{
		Segments:   len(l.segs),
		Spares:     l.spareN,
		Staged:     int(l.end - l.durable),
		Durable:    LSN(l.durable),
		Err:        l.err,
		Room:       l.roomLocked(),
		Full:       l.full,
		PrepareErr: l.tendErr,
	}
	for _, seg := range l.segs {
		s.Bytes += seg.header.size
	}
	if len(l.segs) > 0 {
		s.Oldest = LSN(l.segs[0].start + 1)
	}
	return s
}
