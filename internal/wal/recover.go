package wal

import (
	"context"
	"errors"
	"fmt"
)

// recovery reads a log from its directory. It follows "Recovery" in
// docs/FORMAT.md and changes nothing; Log.resume does.
type recovery struct {
	l      *Log
	ctx    context.Context
	replay func(LSN, Record) error
	segs   []*segment

	have    bool        // a valid batch has been read
	held    bool        // and one that holds records
	last    batchHeader // of the last valid batch
	lastCRC uint32
	lastIn  int    // index of its segment
	lastOff int64  // its offset there
	before  uint64 // number of the segment of the batch before it
	pos     uint64 // stream position
	pending []byte // the carried kinds of records in the last batch

	shared []byte   // memory of the window; segments are read one after another
	end    int      // index of the segment in which the log ends
	unused *segment // the one prepared after it, or nil
}

// recover reads what is in the directory and makes the log ready to go on.
func (l *Log) recover(ctx context.Context, replay func(LSN, Record) error) error {
	names, err := l.o.FS.List(l.o.Dir)
	if err != nil {
		return fmt.Errorf("wal: list the log's directory: %w", err)
	}
	r := &recovery{l: l, ctx: ctx, replay: replay}
	defer func() { l.segs = r.segs }() // closed by the caller if Open fails
	if err := r.read(names); err != nil {
		return err
	}
	l.end, l.durable = r.pos, r.pos
	l.stage.start = r.pos
	l.lastLSN = LSN(r.pos)
	l.segs = r.segs
	if err := errors.Join(l.adoptSpares(names), l.adoptReserve()); err != nil {
		return err
	}
	// A process that was killed between renaming and syncing may have left a
	// segment which a power cut would take away, or a spare to which it would give
	// its old name back, as a segment of the log. No file must be written to
	// before its name is certain. What resume renames itself it also syncs.
	if err := l.o.FS.SyncDir(l.o.Dir); err != nil {
		return fmt.Errorf("wal: sync the log's directory: %w", err)
	}
	if err := l.resume(r); err != nil {
		return fmt.Errorf("wal: make what was recovered durable: %w", err)
	}
	l.curFree, l.carried = l.cur.free(), l.carry.size()
	return nil
}

// read reads the log and changes nothing. names are the files in its directory.
func (r *recovery) read(names []string) error {
	l := r.l
	var block [blockSize]byte
	for _, name := range names {
		if id, ok := parseName(name, spareSuffix); ok {
			l.spareID = max(l.spareID, id)
		}
		number, ok := parseName(name, segmentSuffix)
		if !ok {
			continue
		}
		seg, err := l.openSegment(name)
		if err != nil {
			return err
		}
		r.segs = append(r.segs, seg)
		if err := l.checkSegment(seg, number, &block); err != nil {
			return err
		}
		if n := len(r.segs); n > 1 && r.segs[n-2].header.number+1 != number {
			return corrupt(l.path(name), 0, "segment %d after segment %d: those between are missing", number, r.segs[n-2].header.number)
		}
	}
	var done, total int64
	for _, seg := range r.segs {
		total += seg.header.size
	}
	for i, seg := range r.segs {
		ended, err := r.readSegment(i)
		if err != nil {
			return err
		}
		if done += seg.header.size; l.o.OnRead != nil {
			l.o.OnRead(done, total)
		}
		if ended {
			break
		}
	}
	return r.checkStart()
}

func (l *Log) openSegment(name string) (*segment, error) {
	f, err := l.o.FS.Open(l.path(name))
	if err != nil {
		return nil, fmt.Errorf("wal: open a segment: %w", err)
	}
	return &segment{name: name, file: f, off: blockSize}, nil
}

// readHeader reads the segment's header into b and decodes it. wrong is what is the
// matter with it, err an error of the disk.
func (l *Log) readHeader(seg *segment, b *[blockSize]byte) (wrong string, err error) {
	size, err := seg.file.Size()
	if err != nil {
		return "", fmt.Errorf("wal: %s: %w", seg.name, err)
	}
	if size < 4*blockSize {
		return fmt.Sprintf("a file of %d bytes, too short for a segment", size), nil
	}
	if err := readFull(seg, b[:], 0); err != nil {
		return "", err
	}
	seg.header, wrong = decodeSegmentHeader(b[:])
	if wrong == "" && seg.header.version <= formatVersion && seg.header.size != size {
		wrong = fmt.Sprintf("a file of %d bytes where the header says %d", size, seg.header.size)
	}
	return wrong, nil
}

// checkSegment refuses a segment that cannot be part of this log.
func (l *Log) checkSegment(seg *segment, number uint64, b *[blockSize]byte) error {
	wrong, err := l.readHeader(seg, b)
	if err != nil {
		return err
	}
	path := l.path(seg.name)
	h := &seg.header
	switch {
	case wrong != "":
		return corrupt(path, 0, "%s", wrong)
	case h.version > formatVersion:
		return &VersionError{File: path, Found: h.version, Max: formatVersion}
	case h.version == 0:
		return corrupt(path, 0, "format version 0")
	case h.tag != l.o.Tag:
		return &TagError{File: path, Found: h.tag, Want: l.o.Tag}
	case h.number != number:
		return corrupt(path, 0, "the header of segment %d in the file of segment %d", h.number, number)
	}
	return nil
}

func (r *recovery) path(seg *segment) string { return r.l.path(seg.name) }

// readSegment reads segment i. It reports whether the log ends there.
func (r *recovery) readSegment(i int) (ended bool, err error) {
	seg := r.segs[i]
	var next *segment
	if i+1 < len(r.segs) {
		next = r.segs[i+1]
	}
	recovered := next != nil && next.header.recovered
	seg.start, seg.used = r.pos, true
	if recovered && next.header.followsIn < seg.header.number {
		return false, nil // next takes the place of all that is here
	}
	if seg.header.recovered && r.have && seg.header.follows != r.link() {
		return false, corrupt(r.path(seg), 64, "a segment that follows batch %d (%08x) where batch %d (%08x) comes before", seg.header.follows.seq, seg.header.follows.crc, r.last.seq, r.lastCRC)
	}
	w := r.window(seg)
	for {
		if recovered && r.have && r.last.seq == next.header.follows.seq {
			return false, nil // next checks the checksum; the rest here does not count
		}
		found, err := r.readBatch(i, w)
		if err != nil {
			return false, err
		}
		if !found {
			break
		}
		if r.last.isFinal() {
			break
		}
	}
	switch {
	case recovered:
		return false, corrupt(r.path(seg), seg.off, "no valid batch %d, which segment %d says it follows", next.header.follows.seq, next.header.number)
	case r.have && r.last.isFinal() && r.lastIn == i && next == nil:
		return false, corrupt(r.path(seg), r.lastOff, "a final seal, after which segment %d must follow, and that file is missing", seg.header.number+1)
	case r.have && r.last.isFinal() && r.lastIn == i:
		return false, nil
	}
	seg.used = seg.off > blockSize
	r.end, r.unused = i, next
	return true, r.checkEnd(i, w)
}

// link names the last batch.
func (r *recovery) link() link { return link{seq: r.last.seq, crc: r.lastCRC} }

// checkEnd makes sure that nothing valid comes after the end of the log, which
// is in segment i: a later batch was written only after every earlier one was
// durable, so it would prove damage.
func (r *recovery) checkEnd(i int, w *window) error {
	seg := r.segs[i]
	switch {
	case seg.header.recovered && seg.off == blockSize:
		return corrupt(r.path(seg), seg.off, "no valid batch at the start of a recovered segment, which was synced with one")
	case i+2 < len(r.segs):
		return corrupt(r.path(seg), seg.off, "neither a valid batch nor a final seal, and segment %d is there, which must follow segment %d", r.segs[i+2].header.number, r.segs[i+1].header.number)
	}
	if err := r.noneLater(seg, seg, seg.off+blockSize, w); err != nil {
		return err
	}
	if r.unused == nil {
		return nil
	}
	return r.noneLater(seg, r.unused, blockSize, r.window(r.unused))
}

// noneLater checks that no block of in, from off on, holds a valid batch
// header. The log has ended in seg.
func (r *recovery) noneLater(seg, in *segment, off int64, w *window) error {
	for ; off < in.header.size; off += blockSize {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		b, err := w.at(off, blockSize)
		if err != nil {
			return err
		}
		if h, _, ok := decodeBatchHeader(b, off, in.header.salt); ok && (!r.have || h.seq > r.last.seq) {
			return corrupt(r.path(seg), seg.off, "no valid batch, and yet batch %d follows in %s at offset %d", h.seq, in.name, off)
		}
	}
	return nil
}

// checkStart refuses a log whose oldest segment holds nothing valid, unless it
// is a new log: older segments go only after this one's first batch is synced.
func (r *recovery) checkStart() error {
	if r.l.o.Begun && !r.held {
		return lost(r.l.o.Dir)
	}
	if len(r.segs) > 0 && !r.have && r.segs[0].header.number != 1 {
		return corrupt(r.path(r.segs[0]), blockSize, "no valid first batch in the oldest segment")
	}
	return nil
}

// readBatch reads the batch at the end of what has been read of segment i and
// replays it, if it is valid.
func (r *recovery) readBatch(i int, w *window) (found bool, err error) {
	if err := r.ctx.Err(); err != nil {
		return false, err
	}
	seg := r.segs[i]
	h, crc, body, err := validBatch(w, seg, seg.off)
	if err != nil || body == nil {
		return false, err
	}
	want := r.link()
	if !r.have {
		want = h.prev // released
		if seg.header.recovered {
			want = seg.header.follows
		}
	}
	switch {
	case h.version > formatVersion:
		return false, &VersionError{File: r.path(seg), Found: uint32(h.version), Max: formatVersion}
	case h.isSeal() && (h.carried > 0 || h.records > 0), h.isFinal() && !h.isSeal():
		return false, corrupt(r.path(seg), seg.off, "batch %d with flags %#x and %d bytes: only a seal ends a segment, and a seal holds nothing", h.seq, h.flags, h.carried+h.records)
	case h.prev != want:
		return false, corrupt(r.path(seg), seg.off, "batch %d, which follows batch %d (%08x), where batch %d (%08x) comes before", h.seq, h.prev.seq, h.prev.crc, want.seq, want.crc)
	case h.seq <= want.seq:
		return false, corrupt(r.path(seg), seg.off, "batch %d after batch %d", h.seq, want.seq)
	}
	if err := r.deliver(seg, &h, body); err != nil {
		return false, err
	}
	r.before = seg.header.number - 1
	if r.have {
		r.before = r.segs[r.lastIn].header.number
	}
	r.have, r.last, r.lastCRC, r.lastIn, r.lastOff = true, h, crc, i, seg.off
	seg.off += h.space()
	return true, nil
}

// deliver replays a batch.
func (r *recovery) deliver(seg *segment, h *batchHeader, body []byte) error {
	r.held = r.held || h.carried+h.records > 0
	carry := &r.l.carry
	carry.take(r.pending)
	r.pending = r.pending[:0]
	if !r.have {
		err := eachRecord(body[:h.carried], func(_ int, rec Record) error { return r.replay(0, rec) })
		if err != nil {
			return err
		}
		carry.take(body[:h.carried])
	}
	records := body[h.carried:]
	if len(records) > 0 {
		seg.batches = append(seg.batches, batchPlace{pos: r.pos, off: seg.off + batchHeaderSize + int64(h.carried)})
	}
	err := eachRecord(records, func(at int, rec Record) error {
		if carry.wants(rec.Kind) {
			r.pending = append(r.pending, records[at:at+recordHeadSize+len(rec.Data)]...)
		}
		return r.replay(LSN(r.pos+uint64(at)+1), rec)
	})
	r.pos += uint64(len(records))
	return err
}

// validBatch reads the batch at off. body is nil if there is no valid one; it
// is good until the window moves.
func validBatch(w *window, seg *segment, off int64) (h batchHeader, crc uint32, body []byte, err error) {
	if off+blockSize > seg.header.size {
		return h, 0, nil, nil
	}
	b, err := w.at(off, blockSize)
	if err != nil {
		return h, 0, nil, err
	}
	h, crc, ok := decodeBatchHeader(b, off, seg.header.salt)
	if !ok || off+h.space() > seg.header.size {
		return h, 0, nil, nil
	}
	b, err = w.at(off, h.space())
	if err != nil {
		return h, 0, nil, err
	}
	body = b[batchHeaderSize : batchHeaderSize+int64(h.carried)+int64(h.records)]
	if !checkRecords(body[:h.carried], h.carriedCRC) || !checkRecords(body[h.carried:], h.recordsCRC) {
		return h, 0, nil, nil
	}
	return h, crc, body, nil
}

// window reads a segment in large pieces.
type window struct {
	seg *segment
	r   *recovery // whose shared memory it uses
	off int64
	b   []byte
}

const windowBytes = 1 << 20

// window returns a window on a segment. It is the end of an earlier one.
func (r *recovery) window(seg *segment) *window { return &window{seg: seg, r: r} }

// at returns n bytes at off, which lie within the segment. They are good until
// the next call.
func (w *window) at(off, n int64) ([]byte, error) {
	if off < w.off || off+n > w.off+int64(len(w.b)) {
		size := min(max(n, windowBytes), w.seg.header.size-off)
		if w.b = w.r.shared; int64(cap(w.b)) < size {
			w.b = make([]byte, size)
			w.r.shared = w.b
		}
		w.b = w.b[:size]
		w.off = off
		if err := readFull(w.seg, w.b, off); err != nil {
			w.b = w.b[:0]
			return nil, err
		}
	}
	return w.b[off-w.off:][:n], nil
}

// resume makes durable what was read and gets ready to write. What counts as
// durable is only what is proven: the last batch may have been read from a
// cache whose sync had failed.
func (l *Log) resume(r *recovery) error {
	if len(r.segs) == 0 {
		seg, err := l.prepare(segmentHeader{number: 1}, 0, false, nil)
		if err != nil {
			return err
		}
		r.segs = append(r.segs, seg)
		l.cur = seg
		return nil
	}
	l.cur = r.segs[r.end]
	l.seq, l.last = r.last.seq, r.link()
	if r.have && !r.last.isSeal() {
		return l.copyLast(r)
	}
	if r.unused != nil {
		l.setNext(r.unused)
		r.segs = r.segs[:r.end+1]
	}
	if r.have {
		if err := l.renewSeal(r); err != nil {
			return err
		}
	}
	l.carry.take(r.pending)
	l.half = l.cur.off > l.cur.header.size/2
	return nil
}

// renewSeal makes the seal durable with which the log ends, by writing the
// same bytes again: it holds nothing that a torn write could lose. If the next
// batch's header is there, the seal is known to be durable, and must stay
// whole, because without it that header would prove damage.
func (l *Log) renewSeal(r *recovery) error {
	b := make([]byte, blockSize)
	if l.cur.off+blockSize <= l.cur.header.size {
		if err := readFull(l.cur, b, l.cur.off); err != nil {
			return err
		}
		if _, _, ok := decodeBatchHeader(b, l.cur.off, l.cur.header.salt); ok {
			return nil
		}
	}
	seg := r.segs[r.lastIn]
	clear(b)
	r.last.encode(b, r.lastOff)
	if _, err := seg.file.WriteAt(b, r.lastOff); err != nil {
		return fmt.Errorf("write %s: %w", seg.name, err)
	}
	if err := seg.file.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", seg.name, err)
	}
	return nil
}

// copyLast copies the last batch, which nothing proves, into a segment of its
// own that names the batch before, and seals it. It is never written over
// where it is, because it may have been acknowledged.
func (l *Log) copyLast(r *recovery) error {
	old := r.segs[r.lastIn]
	h, crc, body, err := validBatch(r.window(old), old, r.lastOff)
	if err != nil {
		return err
	}
	if body == nil || crc != r.lastCRC {
		return corrupt(r.path(old), r.lastOff, "other bytes than a moment ago")
	}
	records := body[h.carried:]
	carried, heads := l.carry.encode() // as of the batch before
	block := append(make([]byte, batchHeaderSize), carried...)
	block = append(block, records...)
	copied := batchHeader{
		carried: uint32(len(carried)), carriedCRC: heads,
		records: h.records, recordsCRC: h.recordsCRC,
	}
	l.last = h.prev
	number := r.segs[r.end].header.number + 1
	header := segmentHeader{number: number, recovered: true, follows: h.prev, followsIn: r.before}
	seg, err := l.prepare(header, blocks(int64(len(block))), true, func(seg *segment) error {
		if err := l.put(seg, block, copied); err != nil {
			return err
		}
		return l.seal(seg, flagSeal)
	})
	if err != nil {
		return err
	}
	seg.start, seg.used = r.pos, true
	if len(records) > 0 {
		seg.start = r.pos - uint64(len(records))
		seg.batches = []batchPlace{{pos: seg.start, off: blockSize + batchHeaderSize + int64(len(carried))}}
		old.batches = old.batches[:len(old.batches)-1]
	}
	if r.unused != nil { // its name has gone to seg, and it never held anything
		_ = r.unused.file.Close()
	}
	r.segs = append(r.segs[:r.end+1:r.end+1], seg)
	l.cur = seg
	l.carry.take(r.pending)
	return l.handOn(old, r.link())
}

// handOn ends the segment from which the last batch was copied with a final seal.
// Nothing counts there any more while the segment that took over is there; but if
// that is lost, with all that will be written to it, the seal says so.
func (l *Log) handOn(old *segment, last link) error {
	if old.off+blockSize > old.header.size {
		return nil // nothing that we wrote leaves no room for a seal
	}
	current := l.last
	l.last = last
	err := l.seal(old, flagSeal|flagFinal)
	l.last = current
	return err
}

// adoptSpares keeps files for recycling, and removes those that are too many
// or were not finished: a valid header is written only to a file that has been
// filled and synced.
func (l *Log) adoptSpares(names []string) error {
	var block [blockSize]byte
	for _, name := range names {
		if _, ok := parseName(name, spareSuffix); !ok {
			continue
		}
		seg, err := l.openSegment(name)
		if err != nil {
			return err
		}
		wrong, err := l.readHeader(seg, &block)
		if err == nil && wrong == "" && len(l.spares) < l.o.MaxSpares && l.recyclable(seg) {
			l.spares = append(l.spares, seg)
			continue
		}
		if err := errors.Join(seg.file.Close(), l.o.FS.Remove(l.path(name))); err != nil {
			return fmt.Errorf("wal: remove a spare segment: %w", err)
		}
	}
	l.noteSpares()
	return nil
}
