package raft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// This file makes a client's requests take effect once, however often they are
// sent: thesis 6.3. A session and the results that it keeps are part of the
// replicated state: every node has the same ones after the same entry, so
// nothing here asks a clock or a Config. Time is the time of entries, and the
// bounds are those of the newest entry that opened a session.

// SessionID names a session: the index of the entry that opened it, so that
// none is used twice. It is plain data: whoever has it may use the session on
// any node.
type SessionID uint64

// sessionIDOf returns the ID of the session that an entry opens. After Recover a
// cluster gives out indexes that its former self may have given to sessions on
// nodes that are lost. Its terms are raised, and keep such sessions apart.
func sessionIDOf(id EntryID) SessionID {
	return SessionID(uint64(id.Index) + uint64(id.Term)/termStep*indexStep)
}

// RequestID names a request of a client, so that it takes effect once.
type RequestID struct {
	Session SessionID
	Seq     uint64 // from 1 on; the client numbers its requests, and may have several on their way
	// DoneBelow says that the client has the answers to all requests with a
	// lower Seq and won't send them again, so that their results are dropped.
	// It is at most Seq; 0 says nothing.
	DoneBelow uint64
}

// sessionLimits bound what sessions cost. The entry that opens a session
// carries them, and they hold for all from then on: so all nodes have the same,
// however they are configured.
type sessionLimits struct {
	timeout     uint64 // nanoseconds without a request after which a session ends
	sessions    uint64
	requests    uint64 // of one session from its floor on
	resultBytes uint64 // of one result
	totalBytes  uint64 // of all sessions, counted as below
}

// What sessions and results count for beside the bytes of the result. Both are
// more than they take encoded.
const (
	sessionCost = 64
	resultCost  = 64
)

// sessionTable is all sessions. It is driven by the applier, and by the simulator.
type sessionTable struct {
	limits   sessionLimits
	byID     map[SessionID]*session // never iterated over
	root     session                // of the ring: root.newer is the session used longest ago
	bytes    uint64
	reserved uint64         // what results may add that are not recorded yet
	ended    []endedSession // the newest of those that ended, oldest first
	uses     uint64         // how often a session was put at the end of the ring
	stored   storedRows
}

// session is one client's. Its neighbours in the ring are ordered by last use.
type session struct {
	id           SessionID
	used         uint64 // time of the last request's entry, in nanoseconds
	floor        uint64 // the highest DoneBelow
	kept         []*keptResult
	bytes        uint64
	older, newer *session
	place        uint64 // in the ring: those used later have higher ones
	mark         uint64 // of its row in the database
}

// keptResult is what a request was answered, for whoever sends it again.
type keptResult struct {
	seq  uint64
	at   EntryID
	data []byte
	size uint64 // of a result that is too large to be kept; otherwise 0
	mark uint64 // of its row in the database
}

// storedRows says what the database of a state machine on disk has of a table
// (ondisk.go); with another state machine it stays empty. Each row there has a
// mark, which is not 0.
type storedRows struct {
	sum    uint64    // of all marks
	uses   uint64    // sessions with a higher place are there as they were before
	gone   []goneRow // that are still there
	single [3][]byte // the rows of which there is one
}

// goneRow is the row of a session that has ended, or of a result, if seq is not
// 0, that was dropped.
type goneRow struct {
	id        SessionID
	seq, mark uint64
}

func (r *storedRows) remove(id SessionID, seq, mark uint64) {
	if mark != 0 {
		r.gone = append(r.gone, goneRow{id, seq, mark})
	}
}

type endedSession struct {
	id  SessionID
	why SessionReason
}

// maxEnded is of how many sessions it is remembered how they ended.
const maxEnded = 128

func newSessionTable() *sessionTable {
	t := &sessionTable{byID: map[SessionID]*session{}}
	t.root.newer, t.root.older = &t.root, &t.root
	return t
}

// Layouts of entries (docs/FORMAT.md, "Sessions").
const (
	openDataBytes    = 40
	closeDataBytes   = 8
	requestHeadBytes = 24 // before the command
)

func (l *sessionLimits) encode(b []byte) []byte {
	return appendUint64s(b, l.timeout, l.sessions, l.requests, l.resultBytes, l.totalBytes)
}

func (l *sessionLimits) decode(r *reader) {
	l.timeout, l.sessions, l.requests, l.resultBytes, l.totalBytes = r.uint64(), r.uint64(), r.uint64(), r.uint64(), r.uint64()
}

func (id RequestID) encode() []byte {
	return appendUint64s(nil, uint64(id.Session), id.Seq, id.DoneBelow)
}

func decodeRequest(b []byte) (id RequestID, command []byte) {
	u := binary.LittleEndian.Uint64
	return RequestID{SessionID(u(b)), u(b[8:]), u(b[16:])}, b[requestHeadBytes:]
}

// admission is what an entry means for the sessions.
type admission struct {
	at      int         // the entry's place in its run
	execute bool        // the state machine is to be given the command; record takes its result
	command []byte      // of a request
	session *session    // of a request that is executed
	reserve uint64      // the longest result that is kept
	kept    *keptResult // of the request; it may not be recorded yet
	err     error       // a *SessionError
}

// admit takes entry i of a run, which is about a session. It returns false,
// and has done nothing, if that depends on results which are not recorded yet:
// all nodes must decide alike, however many entries each of them takes at once.
func (t *sessionTable) admit(e Entries, i int) (admission, bool) {
	kind := e.kind(i)
	if t.reserved > 0 && (kind == entryOpenSession || t.bytes+t.reserved > t.limits.totalBytes) {
		return admission{}, false
	}
	a, now := admission{at: i}, e.nanos(i)
	switch kind {
	case entryOpenSession:
		t.open(sessionIDOf(EntryID{e.First() + Index(i), e.term(i)}), now, e.data(i))
	case entryCloseSession:
		t.expire(now)
		a.err = t.close(SessionID(binary.LittleEndian.Uint64(e.data(i))))
	case entryOnce:
		t.expire(now)
		t.request(&a, EntryID{e.First() + Index(i), e.term(i)}, now, e.data(i))
	}
	return a, true
}

// expire ends the sessions that were not used for too long.
func (t *sessionTable) expire(now uint64) {
	for s := t.root.newer; s != &t.root && now > s.used && now-s.used > t.limits.timeout; s = t.root.newer {
		t.end(s, SessionExpired)
	}
}

func (t *sessionTable) open(id SessionID, now uint64, data []byte) {
	t.limits.decode(&reader{b: data})
	t.expire(now)
	s := &session{id: id, used: now}
	t.byID[id] = s
	t.bytes += sessionCost
	t.link(s)
	t.shrink()
}

func (t *sessionTable) close(id SessionID) error {
	s := t.byID[id]
	if s != nil {
		t.end(s, SessionClosed)
		return nil
	}
	if err := t.missing(id); err.Reason != SessionClosed {
		return err
	}
	return nil // closed before: what it asked for is so
}

// request decides about one request.
func (t *sessionTable) request(a *admission, at EntryID, now uint64, data []byte) {
	id, command := decodeRequest(data)
	s := t.byID[id.Session]
	if s == nil {
		a.err = t.missing(id.Session)
		return
	}
	s.used = now
	t.unlink(s)
	t.link(s)
	t.raise(s, id.DoneBelow)
	if id.Seq < s.floor || id.Seq == 0 {
		a.err = &SessionError{Reason: SessionSequence, Session: s.id, Seq: id.Seq, DoneBelow: s.floor}
		return
	}
	k, found := slices.BinarySearchFunc(s.kept, id.Seq, func(k *keptResult, seq uint64) int {
		switch {
		case k.seq < seq:
			return -1
		case k.seq > seq:
			return 1
		}
		return 0
	})
	switch {
	case found:
		a.kept = s.kept[k]
		return
	case id.Seq-s.floor >= t.limits.requests:
		t.end(s, SessionOverrun)
		a.err = &SessionError{Reason: SessionOverrun, Session: s.id}
		return
	}
	a.execute, a.command, a.session, a.reserve = true, command, s, t.limits.resultBytes
	a.kept = &keptResult{seq: id.Seq, at: at}
	s.kept = slices.Insert(s.kept, k, a.kept)
	s.bytes += resultCost
	t.bytes += resultCost
	t.reserved += a.reserve
}

// raise drops the results that the client needs no more.
func (t *sessionTable) raise(s *session, floor uint64) {
	s.floor = max(s.floor, floor)
	n := 0
	for n < len(s.kept) && s.kept[n].seq < s.floor {
		cost := resultCost + uint64(len(s.kept[n].data))
		s.bytes -= cost
		t.bytes -= cost
		t.stored.remove(s.id, s.kept[n].seq, s.kept[n].mark)
		n++
	}
	s.kept = slices.Delete(s.kept, 0, n)
}

// record keeps the result of a request that was executed. The session may have
// ended since it was admitted, or its client may need the result no more.
func (t *sessionTable) record(a *admission, result []byte) {
	t.reserved -= a.reserve
	n, k, s := uint64(len(result)), a.kept, a.session
	if n > a.reserve {
		k.size = n
		return
	}
	k.data = slices.Clone(result) // the proposer may change what it is given
	if t.keeps(s, k) {
		s.bytes += n
		t.bytes += n
	}
}

// keeps says whether k, which s has had, is still there.
func (t *sessionTable) keeps(s *session, k *keptResult) bool {
	return t.byID[s.id] == s && k.seq >= s.floor
}

// shrink ends sessions until the bounds are kept: those used longest ago if
// they are too many, those that keep most if they keep too much.
func (t *sessionTable) shrink() {
	for uint64(len(t.byID)) > t.limits.sessions {
		t.end(t.root.newer, SessionDisplaced)
	}
	for t.bytes > t.limits.totalBytes {
		largest := t.root.newer
		for s := largest.newer; s != &t.root; s = s.newer {
			if s.bytes > largest.bytes {
				largest = s
			}
		}
		t.end(largest, SessionDisplaced)
	}
}

func (t *sessionTable) end(s *session, why SessionReason) {
	t.unlink(s)
	delete(t.byID, s.id)
	t.bytes -= sessionCost + s.bytes
	t.noteEnd(endedSession{s.id, why})
	if s.mark == 0 {
		return
	}
	t.stored.remove(s.id, 0, s.mark)
	for _, k := range s.kept {
		t.stored.remove(s.id, k.seq, k.mark)
	}
}

func (t *sessionTable) noteEnd(e endedSession) {
	if len(t.ended) == maxEnded {
		t.ended = slices.Delete(t.ended, 0, 1)
	}
	t.ended = append(t.ended, e)
}

// missing says why there is no such session.
func (t *sessionTable) missing(id SessionID) *SessionError {
	for _, e := range t.ended {
		if e.id == id {
			return &SessionError{Reason: e.why, Session: id}
		}
	}
	return &SessionError{Reason: SessionUnknown, Session: id}
}

// link makes s the session that was used last.
func (t *sessionTable) link(s *session) {
	t.uses++
	s.place = t.uses
	s.older, s.newer = t.root.older, &t.root
	s.older.newer, s.newer.older = s, s
}

func (t *sessionTable) unlink(s *session) { s.older.newer, s.newer.older = s.newer, s.older }

// portion is a piece of a run of entries that the state machine can execute at
// once: no decision about a session in it depends on a result of it.
type portion struct {
	run      Entries
	to       int     // it ends before this entry of the run
	commands []Entry // for the state machine
	at       []int   // where in the run each of them is
	sessions []admission
}

// plan makes p the portion of run that begins with entry from.
func (t *sessionTable) plan(run Entries, from int, p *portion) {
	p.run, p.to = run, run.Len()
	p.commands, p.at, p.sessions = p.commands[:0], p.at[:0], p.sessions[:0]
	for i := from; i < run.Len(); i++ {
		kind := run.kind(i)
		if kind == entryCommand {
			p.commands, p.at = append(p.commands, run.entry(i)), append(p.at, i)
		}
		if kind < entryOpenSession {
			continue
		}
		a, ok := t.admit(run, i)
		if !ok {
			p.to = i
			return
		}
		if a.execute {
			e := run.entry(i)
			e.Data = a.command
			p.commands, p.at = append(p.commands, e), append(p.at, i)
		}
		p.sessions = append(p.sessions, a)
	}
}

// executed takes the results of p, one for each entry of its run.
func (t *sessionTable) executed(p *portion, results [][]byte) {
	for i := range p.sessions {
		if a := &p.sessions[i]; a.execute {
			t.record(a, results[a.at])
		}
	}
	// Only the last result can have made this needed: plan has looked before it
	// took another entry.
	t.shrink()
}

// outcome is what the proposer of an entry about a session is told.
func (a *admission) outcome(id EntryID) (Result, error) {
	if a.err != nil || a.kept == nil {
		return Result{Index: id.Index, Term: id.Term}, a.err
	}
	r := Result{Index: a.kept.at.Index, Term: a.kept.at.Term, Data: slices.Clone(a.kept.data)}
	if a.kept.size > 0 {
		return r, &ResultSizeError{Index: r.Index, Size: a.kept.size}
	}
	return r, nil
}

const sessionsVersion = 1

// encode appends the table as it stands in snapshots: nothing if no session was
// ever opened.
func (t *sessionTable) encode(b []byte) []byte {
	if t.limits == (sessionLimits{}) {
		return b
	}
	b = t.limits.encode(append(b, sessionsVersion))
	b = binary.AppendUvarint(b, uint64(len(t.ended)))
	for _, e := range t.ended {
		b = append(binary.AppendUvarint(b, uint64(e.id)), byte(e.why))
	}
	b = binary.AppendUvarint(b, uint64(len(t.byID)))
	for s := t.root.newer; s != &t.root; s = s.newer {
		b = binary.AppendUvarint(b, uint64(s.id))
		b = appendUint64s(b, s.used)
		b = binary.AppendUvarint(b, s.floor)
		b = binary.AppendUvarint(b, uint64(len(s.kept)))
		for _, k := range s.kept {
			b = binary.AppendUvarint(b, k.seq)
			b = binary.AppendUvarint(b, uint64(k.at.Index))
			b = binary.AppendUvarint(b, uint64(k.at.Term))
			b = binary.AppendUvarint(b, k.size)
			b = appendString(b, string(k.data))
		}
	}
	return b
}

var errSessions = errors.New("raft: sessions in a snapshot are malformed")

// decodeSessions reads what encode writes.
func decodeSessions(b []byte) (*sessionTable, error) {
	t := newSessionTable()
	if len(b) == 0 {
		return t, nil
	}
	r := reader{b: b}
	if v := r.byte(); v != sessionsVersion {
		return nil, fmt.Errorf("%w: version %d, this program knows %d", errSessions, v, sessionsVersion)
	}
	t.limits.decode(&r)
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		e := endedSession{SessionID(r.uvarint()), SessionReason(r.byte())}
		if e.why < SessionExpired || e.why > SessionClosed || len(t.ended) == maxEnded {
			return nil, errSessions
		}
		t.noteEnd(e)
	}
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		s, ok := decodeSession(&r)
		if !ok || t.byID[s.id] != nil || s.used < t.root.older.used {
			return nil, errSessions
		}
		t.byID[s.id] = s
		t.bytes += sessionCost + s.bytes
		t.link(s)
	}
	if r.err != nil || len(r.b) > 0 || t.limits == (sessionLimits{}) {
		return nil, errSessions
	}
	return t, nil
}

func decodeSession(r *reader) (*session, bool) {
	s := &session{id: SessionID(r.uvarint()), used: r.uint64(), floor: r.uvarint()}
	last := max(s.floor, 1) - 1
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		k := &keptResult{seq: r.uvarint(), at: EntryID{Index(r.uvarint()), Term(r.uvarint())}, size: r.uvarint()}
		k.data = slices.Clone(r.bytes(r.uvarint()))
		if k.seq <= last || k.size > 0 && len(k.data) > 0 {
			return s, false
		}
		last = k.seq
		s.kept = append(s.kept, k)
		s.bytes += resultCost + uint64(len(k.data))
	}
	return s, r.err == nil
}
