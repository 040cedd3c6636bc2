package raft

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// Exactly-once clients in the simulator. Each has a session, in which it asks
// several things at once. What is not answered it asks again, on whatever node,
// and sometimes it asks what it was answered before. Whatever happens, a command
// takes effect once (19), and every answer to it is the first one.

// simSessionCounts counts what happened to them.
type simSessionCounts struct {
	Opened   int
	Asked    int // attempts
	Again    int // of them, those that were not the first
	Repeated int // answers to what was answered before
	Dropped  int // questions of which the client had said that it has the answer
	Ended    int // sessions that were not closed by their client
	Closed   int
}

func (c *simSessionCounts) add(o simSessionCounts) {
	c.Opened += o.Opened
	c.Asked += o.Asked
	c.Again += o.Again
	c.Repeated += o.Repeated
	c.Dropped += o.Dropped
	c.Ended += o.Ended
	c.Closed += o.Closed
}

// simSession is one client's session.
type simSession struct {
	id       SessionID
	opening  bool
	closing  bool
	over     bool // a client was told so
	seq      uint64
	said     uint64   // the highest DoneBelow
	asked    []*simOp // without an answer, by ascending Seq
	answered []*simOp // the newest of the others
}

// drawSessions decides whether clients open sessions. It has dice of its own,
// so that the other seeds stay what they are.
func (s *sim) drawSessions() {
	dice := rand.New(rand.NewPCG(s.seed, 0x5e55))
	if w := &s.swarm; dice.Float64() < 0.5 {
		w.sessions = 1 + dice.IntN(4)
		w.sessionP = dice.Float64()
		w.sessionTimeout = time.Duration(s.logUniform(float64(time.Second), float64(3*time.Hour)))
	}
}

// drawSessionLimits differ from one opened session to the next, as they do
// during a rolling change.
func (s *sim) drawSessionLimits() sessionLimits {
	w := &s.swarm
	return sessionLimits{
		timeout:     uint64(w.sessionTimeout) / uint64(s.between(1, 2)),
		sessions:    uint64(s.between(max(1, w.sessions-1), w.sessions+3)),
		requests:    uint64(s.between(4, 16)),
		resultBytes: uint64(s.between(8, 100)),
		totalBytes:  uint64(s.logUniform(float64(w.sessions*sessionCost), float64(w.sessions*sessionCost+60*resultCost))),
	}
}

// useSession adds to a batch of proposals what some client has to ask.
func (l *simClients) useSession(s *sim, b *entryBuilder, props []*Proposal) []*Proposal {
	k := s.rng.IntN(len(l.sessions))
	c := l.sessions[k]
	if c.over {
		c = &simSession{}
		l.sessions[k] = c
	}
	switch {
	case c.opening || c.closing:
		return props
	case c.id == 0:
		c.opening = true
		limits := s.drawSessionLimits()
		b.add(entryOpenSession, limits.encode(nil))
		return append(props, l.attempt(&simOp{kind: entryOpenSession, session: c}))
	case s.chance(0.01):
		c.closing = true
		b.add(entryCloseSession, appendUint64s(nil, uint64(c.id)))
		return append(props, l.attempt(&simOp{kind: entryCloseSession, session: c}))
	}
	op := l.choose(s, c)
	if op == nil {
		return props
	}
	below := c.seq + 1
	if len(c.asked) > 0 {
		below = c.asked[0].seq
	}
	if s.chance(0.3) {
		below = c.said // it has nothing to say
	}
	below = min(below, op.seq)
	c.said = max(c.said, below)
	b.add(entryOnce, RequestID{c.id, op.seq, below}.encode(), op.cmd)
	s.sessions.Asked++
	if op.attempts > 0 {
		s.sessions.Again++
	}
	return append(props, l.attempt(op))
}

// choose returns what a client asks: something new, what it has no answer to,
// or what it was answered before.
func (l *simClients) choose(s *sim, c *simSession) *simOp {
	idle := slices.IndexFunc(c.asked, func(op *simOp) bool { return op.asking == 0 || s.chance(0.1) })
	switch {
	case idle >= 0 && s.chance(0.7):
		return c.asked[idle]
	case len(c.asked) < 3:
		op := l.newOp(s)
		c.seq++
		op.kind, op.session, op.seq = entryOnce, c, c.seq
		op.cmd = simCommand(op.id, op.key, op.write, s.rng.IntN(s.swarm.dataMax+1))
		c.asked = append(c.asked, op)
		return op
	case len(c.answered) > 0:
		return c.answered[s.rng.IntN(len(c.answered))]
	}
	return nil
}

func (l *simClients) attempt(op *simOp) *Proposal {
	p := &Proposal{}
	op.asking++
	op.attempts++
	l.byProp[p] = op
	return p
}

// attemptEnds takes the outcome of one attempt.
func (l *simClients) attemptEnds(s *sim, op *simOp, p *Proposal) {
	c := op.session
	op.asking--
	var refused *SessionError
	isRefused := errors.As(p.err, &refused)
	switch {
	case op.kind == entryOpenSession:
		if c.opening = false; p.err == nil {
			c.id = SessionID(p.result.Index)
			s.sessions.Opened++
		}
		return
	case op.kind == entryCloseSession:
		if p.err == nil {
			s.sessions.Closed++
		}
		// Closed, or perhaps: nobody asks anything more.
		c.over = true
	case p.err == nil:
		l.requestAnswered(s, op, p.result)
	case isRefused && refused.Reason == SessionSequence:
		if op.seq >= c.said || op.state == opWaiting {
			s.fail("19 request %d of session %d is refused, its client has said %d", op.seq, c.id, c.said)
		}
		s.sessions.Dropped++
	case isRefused:
		if refused.Reason == SessionClosed && !c.closing || refused.Reason == SessionUnknown && s.sessions.Opened < maxEnded {
			s.fail("19 a request is refused: %v", refused)
		}
		if !c.over {
			s.sessions.Ended++
		}
		c.over = true
	case errors.Is(p.err, ErrOutcomeUnknown):
		op.unknown = true
	}
	if c.over {
		l.giveUp(s, c)
	}
}

// requestAnswered checks an answer. Whoever asks again gets the first one.
func (l *simClients) requestAnswered(s *sim, op *simOp, r Result) {
	c := op.session
	switch op.state {
	case opRejected:
		s.fail("20 request %d of session %d was never executed, and is answered %+v", op.seq, c.id, r)
	case opAnswered:
		if r.Index != op.result.Index || r.Term != op.result.Term || string(r.Data) != string(op.result.Data) {
			s.fail("19 request %d of session %d is answered %+v, and was %+v", op.seq, c.id, r, op.result)
		}
		s.sessions.Repeated++
		return
	case opUnknown:
		l.unknown--
	}
	op.state, op.result, op.returned = opAnswered, r, s.now
	l.answer(s, op, r)
	c.asked = slices.DeleteFunc(c.asked, func(o *simOp) bool { return o == op })
	if c.answered = append(c.answered, op); len(c.answered) > 4 {
		c.answered = c.answered[1:]
	}
}

// giveUp ends what a client asked in a session that is over. Where every attempt
// was refused or rejected, the command never takes effect.
func (l *simClients) giveUp(s *sim, c *simSession) {
	c.asked = slices.DeleteFunc(c.asked, func(op *simOp) bool {
		if op.asking > 0 {
			return false
		}
		op.returned = s.now
		if op.unknown {
			op.state = opUnknown
			l.unknown++
			return true
		}
		if op.state = opRejected; op.committed != 0 {
			s.fail("20 no attempt of request %d of session %d had an effect, and it is committed as entry %d", op.seq, c.id, op.committed)
		}
		return true
	})
}

// TestSimSessions: clients with sessions only, small bounds, and nodes that are
// restored from snapshots all the time.
func TestSimSessions(t *testing.T) {
	var got simSessionCounts
	plan := simPlan{test: "TestSimSessions", tune: func(w *simSwarm) {
		w.sessions, w.sessionP = max(w.sessions, 3), 0.8
		w.sessionTimeout = max(w.sessionTimeout, 10*time.Second)
		w.snapshotP, w.stateMax = 0.1, 100
		w.dropP, w.breakP, w.dupP, w.oldP = 0.02, 0.02, 0.2, 0.1
		w.rounds, w.boundaryP = 2, 0.3
		w.clientEvery = min(w.clientEvery, w.timeout/10)
		w.lagMax = max(w.lagMax, 100)
		if w.nodes < 3 {
			w.nodes, w.voters = 3, 3
		}
	}}
	if *simSeed != 0 {
		replaySim(t, plan)
		return
	}
	missing := func() bool {
		return got.Opened == 0 || got.Again == 0 || got.Repeated == 0 || got.Dropped == 0 || got.Ended == 0 || got.Closed == 0
	}
	runSeeds(t, seedsFrom(1, plan, untilSeen(20, missing)), func(_ uint64, res simResult) { got.add(res.sessions) })
	t.Logf("%+v", got)
	if missing() {
		t.Errorf("something did not happen: %+v", got)
	}
}
