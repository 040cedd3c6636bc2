package raft

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"time"
)

// This file makes the table that a state machine on disk keeps for the library
// (OnDisk; docs/FORMAT.md, "On-disk state machines"): which rows stand for what
// the state includes and for the sessions, which of them a transaction changes,
// and what must be true of them when they are read.

// A key is one of these bytes. Behind the last one are a session's ID and, with a
// result, its Seq: in the order of keys the first row comes first, and a session
// right before its results, so that a request changes few pages of a database.
const (
	rowFirst byte = iota + 1
	rowConfiguration
	rowLimits
	rowEnded
	rowSession
)

const metaVersion = 1

const (
	firstRowBytes   = 37
	sessionRowBytes = 24
	resultRowHead   = 24 // before the result
	endedBytes      = 9  // of one session that ended
)

func sessionKey(id SessionID) []byte {
	return binary.BigEndian.AppendUint64([]byte{rowSession}, uint64(id))
}

func resultKey(id SessionID, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(sessionKey(id), seq)
}

// markOf returns what a row adds to the sum in the first row. It is never 0.
func markOf(key, value []byte) uint64 {
	return 1<<32 | uint64(crc32.Update(crc32.Update(0, castagnoli, key), castagnoli, value))
}

// put sets the row of which mark is the mark.
func (r *storedRows) put(mark *uint64, key, value []byte) MetaChange {
	r.sum -= *mark
	*mark = markOf(key, value)
	r.sum += *mark
	return MetaChange{key, value}
}

// changes returns what has to change in the database so that it has the table as
// it is, and meta: a row for each session that was used, whose place in the ring
// says so; for each result that was recorded, which only those requests have
// that were executed in this transaction; and for each row that is gone.
func (t *sessionTable) changes(meta *SnapshotMeta, admitted []admission) []MetaChange {
	r := &t.stored
	out := make([]MetaChange, 1, 4+len(r.gone)+2*len(admitted))
	for _, g := range r.gone {
		key := resultKey(g.id, g.seq)
		if g.seq == 0 {
			key = sessionKey(g.id)
		}
		r.sum -= g.mark
		out = append(out, MetaChange{Key: key})
	}
	r.gone = nil
	out = r.singles(out, append(appendUint64s(nil, uint64(meta.ConfigIndex)), meta.Config...), t.limitsRow(), t.endedRow())
	for s := t.root.older; s != &t.root && s.place > r.uses; s = s.older {
		out = append(out, r.put(&s.mark, sessionKey(s.id), appendUint64s(nil, s.used, s.floor, s.place)))
	}
	r.uses = t.uses
	for i := range admitted {
		if a := &admitted[i]; a.execute && t.keeps(a.session, a.kept) {
			out = append(out, r.putResult(a.session.id, a.kept))
		}
	}
	out[0] = MetaChange{[]byte{rowFirst}, r.first(meta)}
	return out
}

// rows returns the whole table, for a database that has none of it.
func (t *sessionTable) rows(meta *SnapshotMeta) []MetaChange {
	t.stored = storedRows{}
	var results []MetaChange
	for s := t.root.newer; s != &t.root; s = s.newer {
		s.mark = 0
		for _, k := range s.kept {
			k.mark = 0
			results = append(results, t.stored.putResult(s.id, k))
		}
	}
	return append(t.changes(meta, nil), results...)
}

func (r *storedRows) putResult(id SessionID, k *keptResult) MetaChange {
	value := appendUint64s(make([]byte, 0, resultRowHead+len(k.data)), uint64(k.at.Index), uint64(k.at.Term), k.size)
	return r.put(&k.mark, resultKey(id, k.seq), append(value, k.data...))
}

// singles sets the rows of which there is one and which differ from what they
// were: configuration, limits, ended.
func (r *storedRows) singles(out []MetaChange, rows ...[]byte) []MetaChange {
	for i, value := range rows {
		key, old := []byte{rowConfiguration + byte(i)}, r.single[i]
		if bytes.Equal(old, value) {
			continue
		}
		if len(old) > 0 {
			r.sum -= markOf(key, old)
		}
		if len(value) > 0 {
			r.sum += markOf(key, value)
		} else {
			value = nil
		}
		out = append(out, MetaChange{key, value})
		r.single[i] = value
	}
	return out
}

func (t *sessionTable) limitsRow() []byte {
	if t.limits == (sessionLimits{}) {
		return nil
	}
	return t.limits.encode(nil)
}

func (t *sessionTable) endedRow() []byte {
	b := make([]byte, 0, len(t.ended)*endedBytes)
	for _, e := range t.ended {
		b = append(appendUint64s(b, uint64(e.id)), byte(e.why))
	}
	return b
}

// first returns the first row, which each transaction writes. It stands for all
// others by the sum of their marks.
func (r *storedRows) first(meta *SnapshotMeta) []byte {
	b := make([]byte, 5, firstRowBytes)
	b[0] = metaVersion
	b = appendUint64s(b, uint64(meta.Last.Index), uint64(meta.Last.Term), nanoseconds(meta.Time), r.sum)
	binary.LittleEndian.PutUint32(b[1:], firstRowCRC(b))
	return b
}

func firstRowCRC(b []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, b[:1]), castagnoli, b[5:])
}

// includedUpTo returns which entry is the last that a state includes, if this is
// the first row of its table.
func includedUpTo(key, value []byte) (Index, bool) {
	if !bytes.Equal(key, []byte{rowFirst}) || len(value) != firstRowBytes {
		return 0, false
	}
	return Index(binary.LittleEndian.Uint64(value[5:])), true
}

// loadMeta reads the table of a state machine on disk. Without any rows the
// meta is empty and the sessions are nil.
func loadMeta(d OnDisk) (*SnapshotMeta, *sessionTable, error) {
	var rows []MetaChange
	err := d.LoadMeta(func(key, value []byte) error {
		rows = append(rows, MetaChange{bytes.Clone(key), bytes.Clone(value)})
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("raft: the state machine's LoadMeta failed: %w; open its database before Start", err)
	}
	if len(rows) == 0 {
		return &SnapshotMeta{}, nil, nil
	}
	return decodeMeta(rows)
}

// decodeMeta makes a table of its rows, which it keeps. The error is a
// *MetaError.
func decodeMeta(rows []MetaChange) (*SnapshotMeta, *sessionTable, error) {
	slices.SortFunc(rows, func(a, b MetaChange) int { return bytes.Compare(a.Key, b.Key) })
	l := metaLoader{t: newSessionTable()}
	sum, err := l.first(rows[0])
	if err != nil {
		return nil, nil, err
	}
	for i, row := range rows[1:] {
		if bytes.Equal(row.Key, rows[i].Key) {
			return nil, nil, badRow(row.Key, "it was given twice")
		}
		l.t.stored.sum += markOf(row.Key, row.Value)
	}
	if l.t.stored.sum != sum {
		return nil, nil, badRow(nil, "the %d rows are not those that the first one stands for: some are missing, left over, or not as they were", len(rows))
	}
	for _, row := range rows[1:] {
		if found := l.row(row.Key, row.Value); found != "" {
			return nil, nil, badRow(row.Key, "%s", found)
		}
	}
	if err := l.finish(); err != nil {
		return nil, nil, err
	}
	return &l.meta, l.t, nil
}

// metaLoader builds a table from its rows, in the order of their keys.
type metaLoader struct {
	meta     SnapshotMeta
	t        *sessionTable
	sessions []*session
}

const (
	keepRows = "LoadMeta must give each key once, with the value that it was set to last, and none that was removed; if it does, the database is damaged: start with an empty one, and the state is restored from this node's log and snapshots"
	runNewer = "run the version that wrote it, or start with an empty database, and the state is restored from this node's log and snapshots"
)

func badRow(key []byte, format string, args ...any) error {
	return &MetaError{Key: key, Found: fmt.Sprintf(format, args...), Do: keepRows}
}

// first takes the first row and returns the sum of the marks of all others.
func (l *metaLoader) first(row MetaChange) (uint64, error) {
	b := row.Value
	if !bytes.Equal(row.Key, []byte{rowFirst}) {
		return 0, badRow(nil, "the first row, which every transaction writes, is missing")
	}
	if len(b) < 5 || firstRowCRC(b) != binary.LittleEndian.Uint32(b[1:]) {
		return 0, badRow(row.Key, "its %d bytes have a wrong checksum", len(b))
	}
	if b[0] != metaVersion {
		return 0, &MetaError{Key: row.Key, Found: fmt.Sprintf("it has version %d, this program knows %d", b[0], metaVersion), Do: runNewer}
	}
	r := reader{b: b[5:]}
	l.meta.Last, l.meta.Time = r.entryID(), time.Unix(0, int64(r.uint64())).UTC()
	sum := r.uint64()
	if r.finish() != nil || l.meta.Last.Index == 0 || l.meta.Last.Index > math.MaxInt64 {
		return 0, badRow(row.Key, "its %d bytes are malformed", len(b))
	}
	return sum, nil
}

// row takes one of the other rows and returns what is wrong with it.
func (l *metaLoader) row(key, b []byte) (found string) {
	r := reader{b: key}
	kind := r.byte()
	switch {
	case kind > rowFirst && kind < rowSession && r.finish() == nil:
		l.t.stored.single[kind-rowConfiguration] = b
		return l.single(kind, b)
	case kind == rowSession && len(r.b) == 8:
		return l.session(SessionID(binary.BigEndian.Uint64(r.b)), markOf(key, b), b)
	case kind == rowSession && len(r.b) == 16:
		k := &keptResult{seq: binary.BigEndian.Uint64(r.b[8:]), mark: markOf(key, b)}
		return l.result(SessionID(binary.BigEndian.Uint64(r.b)), k, b)
	}
	return "no row has such a key"
}

func (l *metaLoader) single(kind byte, b []byte) string {
	r := reader{b: b}
	switch kind {
	case rowConfiguration:
		l.meta.ConfigIndex, l.meta.Config = Index(r.uint64()), slices.Clone(r.b)
		if _, err := decodeConfiguration(l.meta.Config); err != nil {
			return err.Error()
		}
		return ""
	case rowLimits:
		if l.t.limits.decode(&r); l.t.limits == (sessionLimits{}) {
			return "it is malformed"
		}
	case rowEnded:
		for len(r.b) > 0 && r.err == nil {
			e := endedSession{SessionID(r.uint64()), SessionReason(r.byte())}
			if e.why < SessionExpired || e.why > SessionClosed || len(l.t.ended) == maxEnded {
				return "it is malformed"
			}
			l.t.noteEnd(e)
		}
	}
	if r.finish() != nil || len(b) == 0 {
		return "it is malformed"
	}
	return ""
}

func (l *metaLoader) session(id SessionID, mark uint64, b []byte) string {
	if len(b) != sessionRowBytes {
		return "it is malformed"
	}
	r := reader{b: b}
	s := &session{id: id, used: r.uint64(), floor: r.uint64(), place: r.uint64(), mark: mark}
	l.t.byID[id] = s
	l.sessions = append(l.sessions, s)
	return ""
}

// result takes a result, of which those of one session come by ascending Seq.
func (l *metaLoader) result(id SessionID, k *keptResult, b []byte) string {
	r := reader{b: b}
	k.at, k.size = r.entryID(), r.uint64()
	k.data = r.b
	s := l.t.byID[id]
	switch {
	case r.err != nil || k.size > 0 && len(k.data) > 0:
		return "it is malformed"
	case s == nil:
		return "there is no such session"
	case k.seq == 0 || k.seq < s.floor:
		return "the session has no use for this result"
	}
	s.kept = append(s.kept, k)
	s.bytes += resultCost + uint64(len(k.data))
	return ""
}

// finish puts the sessions into the ring.
func (l *metaLoader) finish() error {
	t := l.t
	slices.SortFunc(l.sessions, func(a, b *session) int { return cmp.Compare(a.place, b.place) })
	for _, s := range l.sessions {
		if last := t.root.older; s.place <= t.uses || s.used < last.used {
			return badRow(sessionKey(s.id), "two sessions have one place in the order of use, or that is not the order of time")
		}
		t.uses = s.place - 1
		t.bytes += sessionCost + s.bytes
		t.link(s)
	}
	t.stored.uses = t.uses
	if t.limits == (sessionLimits{}) && len(l.sessions) > 0 {
		return badRow([]byte{rowLimits}, "there are sessions, and no bounds")
	}
	if l.meta.Config == nil || l.meta.ConfigIndex > l.meta.Last.Index {
		return badRow([]byte{rowConfiguration}, "there is no configuration, or it is of a later entry than the state")
	}
	return nil
}
