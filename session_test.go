package raft

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// sessionLog makes entries about sessions, for tests.
type sessionLog struct {
	b entryBuilder
}

var testSessionLimits = sessionLimits{timeout: uint64(time.Minute), sessions: 3, requests: 4, resultBytes: 10, totalBytes: 3*sessionCost + 6*resultCost}

func (l *sessionLog) open(limits sessionLimits) { l.b.add(entryOpenSession, limits.encode(nil)) }
func (l *sessionLog) close(id SessionID)        { l.b.add(entryCloseSession, appendUint64s(nil, uint64(id))) }
func (l *sessionLog) request(id RequestID, cmd string) {
	l.b.add(entryOnce, id.encode(), []byte(cmd))
}

// sessionCheck is a table, the entries it was given, and a state machine that
// returns its commands.
type sessionCheck struct {
	t     *testing.T
	table *sessionTable
	last  Index
	at    time.Time
	ran   []string
}

func newSessionCheck(t *testing.T) *sessionCheck {
	return &sessionCheck{t: t, table: newSessionTable(), at: simEpoch}
}

// run applies the entries that f makes, all at once, and returns what each
// proposer is told.
func (c *sessionCheck) run(f func(l *sessionLog)) []string {
	c.t.Helper()
	var l sessionLog
	f(&l)
	e := l.b.seal(c.last+1, 1, c.at)
	c.last = e.Last()
	results := make([][]byte, e.Len())
	var told []string
	var p portion
	for from := 0; from < e.Len(); from = p.to {
		c.table.plan(e, from, &p)
		if p.to == from {
			c.t.Fatalf("no progress at entry %d of the run", from)
		}
		for k, cmd := range p.commands {
			c.ran = append(c.ran, string(cmd.Data))
			results[p.at[k]] = cmd.Data
		}
		c.table.executed(&p, results)
		for _, a := range p.sessions {
			told = append(told, describeOutcome(a.outcome(EntryID{e.First() + Index(a.at), 1})))
		}
	}
	again, err := decodeSessions(c.table.encode(nil))
	if err != nil || !bytes.Equal(again.encode(nil), c.table.encode(nil)) || again.bytes != c.table.bytes || again.reserved != c.table.reserved {
		c.t.Fatalf("the table does not survive a snapshot (%v): %d bytes, then %d", err, c.table.bytes, again.bytes)
	}
	c.table = again
	return told
}

func describeOutcome(r Result, err error) string {
	var s *SessionError
	var size *ResultSizeError
	switch {
	case errors.As(err, &s):
		return [...]string{"unknown", "expired", "displaced", "overrun", "closed", "sequence", "window"}[s.Reason]
	case errors.As(err, &size):
		return fmt.Sprintf("%d: %d bytes", r.Index, size.Size)
	case err != nil:
		return err.Error()
	}
	return fmt.Sprintf("%d: %s", r.Index, r.Data)
}

func (c *sessionCheck) want(what string, got []string, want ...string) {
	c.t.Helper()
	if !slices.Equal(got, want) {
		c.t.Errorf("%s: told %q, want %q", what, got, want)
	}
}

// one applies one request as a run of its own.
func (c *sessionCheck) one(id SessionID, seq, below uint64, cmd string) string {
	c.t.Helper()
	return c.run(func(l *sessionLog) { l.request(RequestID{id, seq, below}, cmd) })[0]
}

func (c *sessionCheck) opened() SessionID {
	c.t.Helper()
	c.run(func(l *sessionLog) { l.open(testSessionLimits) })
	return SessionID(c.last)
}

// Thesis 6.3: a duplicate is not executed, and gets the first one's result. Also
// where both are in one run, and in whatever order numbers come.
func TestSessionDuplicates(t *testing.T) {
	c := newSessionCheck(t)
	id := c.opened()
	c.want("in one run", c.run(func(l *sessionLog) {
		for _, seq := range []uint64{2, 1, 2, 1} {
			l.request(RequestID{id, seq, 0}, fmt.Sprint("cmd", seq))
		}
	}), "2: cmd2", "3: cmd1", "2: cmd2", "3: cmd1")
	c.want("later", []string{c.one(id, 1, 0, "cmd1"), c.one(id, 2, 2, "cmd2"), c.one(id, 2, 2, "another command")}, "3: cmd1", "2: cmd2", "2: cmd2")
	if got := strings.Join(c.ran, " "); got != "cmd2 cmd1" {
		t.Errorf("executed %q", got)
	}
}

// What a client has an answer to is dropped, and never executed again.
func TestSessionSequence(t *testing.T) {
	c := newSessionCheck(t)
	id := c.opened()
	c.want("answers", []string{
		c.one(id, 1, 0, "a"), c.one(id, 2, 1, "b"), c.one(id, 3, 3, "c"),
		c.one(id, 2, 1, "b"), c.one(id, 1, 1, "a"), c.one(id, 0, 0, "z"), c.one(id, 4, 9, "y"), c.one(id, 4, 4, "y"), c.one(id, 9, 9, "d"),
	}, "2: a", "3: b", "4: c", "sequence", "sequence", "sequence", "sequence", "sequence", "10: d")
	if got := strings.Join(c.ran, " "); got != "a b c d" {
		t.Errorf("executed %q", got)
	}
	if s := c.table.byID[id]; len(s.kept) != 1 || s.bytes != resultCost+1 {
		t.Errorf("%d results of %d bytes are kept", len(s.kept), s.bytes)
	}
}

// Unknown, closed and expired sessions, each with its reason.
func TestSessionEnds(t *testing.T) {
	c := newSessionCheck(t)
	a, b := c.opened(), c.opened()
	c.want("never opened", []string{c.one(99, 1, 0, "x")}, "unknown")
	closing := func(id SessionID) string { return c.run(func(l *sessionLog) { l.close(id) })[0] }
	c.want("closed", []string{closing(a), c.one(a, 1, 0, "x"), closing(a), closing(77)}, "4: ", "closed", "6: ", "unknown")
	c.at = c.at.Add(time.Minute)
	c.want("just in time", []string{c.one(b, 1, 0, "y")}, "8: y")
	c.at = c.at.Add(time.Minute + 1)
	c.want("idle for too long", []string{c.one(b, 1, 0, "y"), closing(b)}, "expired", "expired")
	if got := strings.Join(c.ran, " "); got != "y" {
		t.Errorf("executed %q", got)
	}
	if len(c.table.byID) != 0 || c.table.bytes != 0 {
		t.Errorf("%d sessions and %d bytes are left", len(c.table.byID), c.table.bytes)
	}
}

// Each request keeps its session; the one used longest ago makes room.
func TestSessionCountBound(t *testing.T) {
	c := newSessionCheck(t)
	a, b, d := c.opened(), c.opened(), c.opened()
	c.one(a, 1, 0, "x")
	e := c.opened()
	c.want("b was used longest ago", []string{c.one(a, 1, 0, "x"), c.one(b, 1, 0, "x"), c.one(d, 1, 0, "x"), c.one(e, 1, 0, "x")},
		"4: x", "displaced", "8: x", "9: x")
}

// A client that raises DoneBelow never loses its session to its own requests.
func TestSessionOverrun(t *testing.T) {
	c := newSessionCheck(t)
	id := c.opened()
	for seq := uint64(1); seq < 4; seq++ {
		c.one(id, seq, 0, "x")
	}
	c.want("the fourth", []string{c.one(id, 4, 1, "x")}, "5: x")
	c.want("without an answer to the first", []string{c.one(id, 5, 0, "x"), c.one(id, 4, 0, "x")}, "overrun", "overrun")
	if len(c.ran) != 4 {
		t.Errorf("executed %q", c.ran)
	}
}

// A result over its bound is not kept: whoever asks is told so, the first time
// and ever after.
func TestSessionResultSize(t *testing.T) {
	c := newSessionCheck(t)
	id := c.opened()
	big := strings.Repeat("x", 11)
	c.want("told", []string{c.one(id, 1, 0, big), c.one(id, 1, 0, big), c.one(id, 2, 0, big[1:]), c.one(id, 2, 0, big[1:])},
		"2: 11 bytes", "2: 11 bytes", "4: "+big[1:], "4: "+big[1:])
	if len(c.ran) != 2 {
		t.Errorf("executed %q", c.ran)
	}
}

// The bound in bytes ends the session that keeps most, not those that keep little.
func TestSessionBytesBound(t *testing.T) {
	c := newSessionCheck(t)
	limits := testSessionLimits
	limits.totalBytes = 2*sessionCost + 4*resultCost
	a := c.opened()
	c.run(func(l *sessionLog) { l.open(limits) })
	b := SessionID(c.last)
	told := c.run(func(l *sessionLog) {
		l.request(RequestID{b, 1, 0}, "b1")
		l.request(RequestID{a, 1, 0}, "a1")
		l.request(RequestID{a, 2, 0}, "a2")
		l.request(RequestID{a, 3, 0}, "a3") // this is one too many
		l.request(RequestID{a, 3, 0}, "a3")
		l.request(RequestID{b, 1, 0}, "b1")
	})
	c.want("told", told, "3: b1", "4: a1", "5: a2", "6: a3", "displaced", "3: b1")
}

// The newest entry that opened a session says what bounds hold.
func TestSessionLimitsFromLog(t *testing.T) {
	c := newSessionCheck(t)
	a := c.opened()
	limits := testSessionLimits
	limits.timeout, limits.sessions = uint64(time.Second), 1
	c.at = c.at.Add(time.Second)
	c.run(func(l *sessionLog) { l.open(limits) })
	b := SessionID(c.last)
	c.want("one session", []string{c.one(a, 1, 0, "x"), c.one(b, 1, 0, "x")}, "displaced", "4: x")
	c.at = c.at.Add(2 * time.Second)
	c.want("for a second", []string{c.one(b, 2, 0, "x")}, "expired")
}

// Smaller bounds in a run see the results before them, as they would alone: the
// session that keeps most goes.
func TestSessionLimitsInRun(t *testing.T) {
	c := newSessionCheck(t)
	limits := testSessionLimits
	limits.resultBytes, limits.totalBytes = 100, 10_000
	open := func() SessionID {
		c.run(func(l *sessionLog) { l.open(limits) })
		return SessionID(c.last)
	}
	x, y := open(), open()
	c.one(y, 1, 0, strings.Repeat("y", 70))
	c.run(func(l *sessionLog) {
		l.request(RequestID{x, 1, 0}, strings.Repeat("x", 80))
		limits.totalBytes = 3*sessionCost + 2*resultCost + 69
		l.open(limits)
	})
	c.want("x kept most", []string{c.one(x, 1, 0, "x"), c.one(y, 1, 0, "y")}, "displaced", "3: "+strings.Repeat("y", 70))
}

// Errors say what to do, and which of them mean that the session is over.
func TestSessionErrors(t *testing.T) {
	for r := SessionUnknown; r <= SessionWindow; r++ {
		err := &SessionError{Reason: r, Session: 7, Seq: 3, DoneBelow: 5}
		if over := r != SessionSequence && r != SessionWindow; errors.Is(err, ErrSessionExpired) != over || strings.Contains(err.Error(), "open another") != over {
			t.Errorf("reason %d: %v", r, err)
		}
		if !strings.Contains(err.Error(), "session 7") || sessionReasons[r] == "" || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("reason %d: %v", r, err)
		}
	}
}

// What is remembered of ended sessions is bounded.
func TestSessionEndedBound(t *testing.T) {
	c := newSessionCheck(t)
	first := c.opened()
	for range maxEnded + 3 {
		c.opened()
	}
	if n := len(c.table.ended); n != maxEnded {
		t.Errorf("%d ended sessions are remembered, want %d", n, maxEnded)
	}
	c.want("the oldest are forgotten", []string{c.one(first, 1, 0, "x"), c.one(first+3, 1, 0, "x")}, "unknown", "displaced")
}

// The model: the same rules, by one entry after the other and without any
// bookkeeping.

type modelSessions struct {
	limits sessionLimits
	list   []*modelSession // used longest ago first
	ended  map[SessionID]string
	order  []SessionID
}

type modelSession struct {
	id      SessionID
	used    time.Time
	floor   uint64
	results map[uint64]string // what was told
	sizes   map[uint64]int
}

func (s *modelSession) bytes() (n int) {
	for _, size := range s.sizes {
		n += resultCost + size
	}
	return n
}

func (m *modelSessions) end(i int, why string) {
	id := m.list[i].id
	m.list = slices.Delete(m.list, i, i+1)
	m.ended[id] = why
	if m.order = append(m.order, id); len(m.order) > maxEnded {
		delete(m.ended, m.order[0])
		m.order = m.order[1:]
	}
}

func (m *modelSessions) expire(now time.Time) {
	for i := 0; i < len(m.list); {
		if now.Sub(m.list[i].used) > time.Duration(m.limits.timeout) {
			m.end(i, "expired")
		} else {
			i++
		}
	}
}

func (m *modelSessions) shrink() {
	for len(m.list) > int(m.limits.sessions) {
		m.end(0, "displaced")
	}
	for {
		total, largest := 0, 0
		for i, s := range m.list {
			total += sessionCost + s.bytes()
			if s.bytes() > m.list[largest].bytes() {
				largest = i
			}
		}
		if total <= int(m.limits.totalBytes) {
			return
		}
		m.end(largest, "displaced")
	}
}

func (m *modelSessions) find(id SessionID) int {
	return slices.IndexFunc(m.list, func(s *modelSession) bool { return s.id == id })
}

func (m *modelSessions) missing(id SessionID) string {
	if why := m.ended[id]; why != "" {
		return why
	}
	return "unknown"
}

// step executes one operation and returns what its proposer is told.
func (m *modelSessions) step(index Index, op *sessionOp) string {
	if op.kind == entryOpenSession {
		m.limits = op.limits
	}
	if op.kind != entryCommand {
		m.expire(op.at)
	}
	i := m.find(op.id.Session)
	switch op.kind {
	case entryCommand:
		return ""
	case entryOpenSession:
		m.list = append(m.list, &modelSession{id: SessionID(index), used: op.at, results: map[uint64]string{}, sizes: map[uint64]int{}})
		m.shrink()
		return fmt.Sprintf("%d: ", index)
	case entryCloseSession:
		if i >= 0 {
			m.end(i, "closed")
		} else if why := m.missing(op.id.Session); why != "closed" {
			return why
		}
		return fmt.Sprintf("%d: ", index)
	}
	if i < 0 {
		return m.missing(op.id.Session)
	}
	s := m.list[i]
	m.list = append(slices.Delete(m.list, i, i+1), s)
	s.used, s.floor = op.at, max(s.floor, op.id.DoneBelow)
	for seq := range s.results {
		if seq < s.floor {
			delete(s.results, seq)
			delete(s.sizes, seq)
		}
	}
	told, known := s.results[op.id.Seq]
	switch {
	case op.id.Seq < s.floor || op.id.Seq == 0:
		return "sequence"
	case known:
		return told
	case op.id.Seq >= s.floor+m.limits.requests:
		m.end(len(m.list)-1, "overrun")
		return "overrun"
	}
	told = fmt.Sprintf("%d: %s", index, op.cmd)
	s.sizes[op.id.Seq] = len(op.cmd)
	if len(op.cmd) > int(m.limits.resultBytes) {
		told = fmt.Sprintf("%d: %d bytes", index, len(op.cmd))
		s.sizes[op.id.Seq] = 0
	}
	s.results[op.id.Seq] = told
	m.shrink()
	return told
}

type sessionOp struct {
	kind   entryKind
	at     time.Time
	limits sessionLimits
	id     RequestID
	cmd    string
}

func drawSessionOps(t *rapid.T) (ops []sessionOp) {
	at := simEpoch
	var opened []SessionID
	for i := range rapid.IntRange(1, 80).Draw(t, "n") {
		at = at.Add(time.Duration(rapid.SampledFrom([]int{0, 0, 0, 1, 20, 45}).Draw(t, "seconds")) * time.Second)
		op := sessionOp{at: at, kind: rapid.SampledFrom([]entryKind{entryCommand, entryOpenSession, entryCloseSession, entryOnce, entryOnce, entryOnce, entryOnce, entryOnce, entryOnce}).Draw(t, "kind")}
		if i == 0 {
			op.kind = entryOpenSession
		}
		op.cmd = strings.Repeat("x", rapid.SampledFrom([]int{1, 2, 10, 11, 60, 80, 81}).Draw(t, "size"))
		if len(opened) > 0 {
			op.id.Session = opened[len(opened)-1-rapid.IntRange(0, min(len(opened)-1, 4)).Draw(t, "session")]
		}
		switch op.kind {
		case entryOpenSession:
			opened = append(opened, SessionID(i+1))
			op.limits = testSessionLimits
			op.limits.sessions = uint64(rapid.IntRange(1, 4).Draw(t, "sessions"))
			op.limits.totalBytes = uint64(rapid.IntRange(2*sessionCost, 1000).Draw(t, "bytes"))
			op.limits.requests = uint64(rapid.IntRange(1, 6).Draw(t, "requests"))
			op.limits.resultBytes = rapid.SampledFrom([]uint64{10, 80}).Draw(t, "result bytes")
		case entryOnce:
			op.id.Seq = uint64(rapid.IntRange(0, 9).Draw(t, "seq"))
			op.id.DoneBelow = uint64(rapid.SampledFrom([]int{0, 0, 0, 0, 1, 2, 4, 7}).Draw(t, "below"))
		}
		ops = append(ops, op)
	}
	return ops
}

// Nodes that take the log in pieces of any size, and that are restored from a
// snapshot anywhere, agree with the model, which takes entries one by one.
func TestSessionModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ops := drawSessionOps(t)
		model := modelSessions{ended: map[SessionID]string{}}
		var want []string
		for i := range ops {
			want = append(want, model.step(Index(i+1), &ops[i]))
		}
		single, cut := newSessionTable(), newSessionTable()
		for first := 0; first < len(ops); {
			n := rapid.IntRange(1, len(ops)-first).Draw(t, "run")
			got := applyOps(t, cut, first, ops[first:first+n], nil)
			for i := range n {
				alone := applyOps(t, single, first+i, ops[first+i:first+i+1], nil)
				if got[i] != want[first+i] || alone[0] != want[first+i] {
					t.Fatalf("entry %d (%+v): told %q in a run and %q alone, the model says %q", first+i+1, ops[first+i], got[i], alone[0], want[first+i])
				}
			}
			if !bytes.Equal(cut.encode(nil), single.encode(nil)) || cut.bytes != single.bytes || cut.reserved != 0 {
				t.Fatalf("after entry %d the tables differ", first+n)
			}
			if n := len(cut.encode(nil)); n > int(cut.bytes)+maxEnded*11+64 {
				t.Fatalf("%d bytes encoded, %d counted", n, cut.bytes)
			}
			if rapid.Bool().Draw(t, "restart") {
				var err error
				if cut, err = decodeSessions(cut.encode(nil)); err != nil {
					t.Fatal(err)
				}
			}
			first += n
		}
	})
}

// applyOps gives a table one run and returns what each proposer is told. The
// state machine returns its commands. after, if there is one, is called with
// each portion that was executed.
func applyOps(t *rapid.T, table *sessionTable, first int, ops []sessionOp, after func(*portion)) []string {
	var run Entries
	for i, op := range ops {
		var b entryBuilder
		switch op.kind {
		case entryCommand:
			b.add(op.kind, []byte(op.cmd))
		case entryOpenSession:
			b.add(op.kind, op.limits.encode(nil))
		case entryCloseSession:
			b.add(op.kind, appendUint64s(nil, uint64(op.id.Session)))
		case entryOnce:
			b.add(op.kind, op.id.encode(), []byte(op.cmd))
		}
		e := b.seal(Index(first+1+i), 1, op.at)
		whole, err := ParseEntries(Index(first+1), append(slices.Clone(run.Encoded()), e.Encoded()...))
		if err != nil {
			t.Fatal(err)
		}
		run = whole
	}
	told, results := make([]string, run.Len()), make([][]byte, run.Len())
	var p portion
	for from := 0; from < run.Len(); from = p.to {
		table.plan(run, from, &p)
		if p.to <= from {
			t.Fatalf("no progress at entry %d", first+from+1)
		}
		for k, cmd := range p.commands {
			results[p.at[k]] = cmd.Data
		}
		table.executed(&p, results)
		for _, a := range p.sessions {
			told[a.at] = describeOutcome(a.outcome(EntryID{run.First() + Index(a.at), 1}))
		}
		if after != nil {
			after(&p)
		}
	}
	return told
}

// TestSessionsExample: docs/FORMAT.md shows the exact bytes of a table.
func TestSessionsExample(t *testing.T) {
	doc, err := os.ReadFile("docs/FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	_, shown, _ := strings.Cut(string(doc), "```sessions\n")
	shown, _, _ = strings.Cut(shown, "```")
	if want := hexLines(exampleSessions().encode(nil)); shown != want {
		t.Errorf("docs/FORMAT.md shows\n%s\nthe code writes\n```sessions\n%s```", shown, want)
	}
}

// exampleSessions has one open session and one that was closed.
func exampleSessions() *sessionTable {
	t := newSessionTable()
	limits := sessionLimits{timeout: uint64(time.Hour), sessions: 10_000, requests: 1024, resultBytes: 64 << 10, totalBytes: 64 << 20}
	t.open(3, 5, limits.encode(nil))
	t.open(4, 6, limits.encode(nil))
	a := admission{}
	t.request(&a, EntryID{5, 1}, 7, append(RequestID{3, 2, 1}.encode(), "cmd"...))
	t.record(&a, []byte("ok"))
	t.close(4)
	return t
}

// Damaged tables are refused, whatever the damage, without a panic.
func FuzzSessions(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(exampleSessions().encode(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		table, err := decodeSessions(b)
		if err != nil {
			if !errors.Is(err, errSessions) && !errors.Is(err, errShort) {
				t.Fatalf("%v", err)
			}
			return
		}
		again, err := decodeSessions(table.encode(nil))
		if err != nil || !bytes.Equal(again.encode(nil), table.encode(nil)) || again.bytes != table.bytes {
			t.Fatalf("decoded and encoded it is refused or another: %v", err)
		}
	})
}
