package raft

import (
	"encoding/binary"
	"errors"
	"time"
)

// simClients propose commands at random nodes and remember what they were told.
type simClients struct {
	ops      []*simOp // by id-1
	byProp   map[*Proposal]*simOp
	newest   Index // the highest index that any client was told
	answered int
	unknown  int
	calls    []*simCall // forwards under way
	sessions []*simSession
}

type simOpState uint8

const (
	opWaiting simOpState = iota
	opAnswered
	opRejected
	opUnknown
)

type simOp struct {
	p         *Proposal
	id        uint64
	key       byte
	write     bool
	state     simOpState
	invoked   time.Duration
	returned  time.Duration
	floor     Index  // everything up to here was answered before this began
	committed Index  // where it was executed
	value     uint64 // what it read

	// Of a client with a session.
	session  *simSession
	kind     entryKind
	seq      uint64
	cmd      []byte
	asking   int    // attempts under way
	attempts int    // of all
	unknown  bool   // some attempt may be executed yet
	result   Result // the first answer
}

// simBatch is proposals forwarded together.
type simBatch struct {
	props []*Proposal
	ended bool
}

func (l *simClients) init(s *sim) {
	l.byProp = map[*Proposal]*simOp{}
	for range s.swarm.sessions {
		l.sessions = append(l.sessions, &simSession{})
	}
}

// newOp begins a command.
func (l *simClients) newOp(s *sim) *simOp {
	w := &s.swarm
	op := &simOp{p: &Proposal{}, id: uint64(len(l.ops) + 1), key: byte(s.rng.IntN(w.keys)), write: s.chance(0.5), invoked: s.now, floor: l.newest}
	l.ops = append(l.ops, op)
	return op
}

// arrive lets a client propose a few commands at some node.
func (l *simClients) arrive(s *sim) {
	w := &s.swarm
	s.push(simEvent{at: s.now + 1 + time.Duration(s.rng.Int64N(2*int64(w.clientEvery))), kind: evClient})
	if !s.faulty {
		return // the check after healing waits for logs to become equal
	}
	if s.lag() > w.lagMax {
		return // or catching up would take longer than the ten timeouts, at one entry a round trip
	}
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	if leader := s.highestLeader(); leader != nil && s.chance(0.5) {
		n = leader
	}
	c := n.core
	if c == nil || c.role == Dead || c.applyFailed || n.pausedUntil > s.now {
		return
	}
	if c.role == Leader && s.chance(0.3) {
		run := n.run
		if s.beginRead(n); n.run != run || n.core == nil {
			return
		}
	}
	if c.role == Leader && n.wal != nil {
		n.wal.storage.Claim(int64(w.batchMax) * (int64(w.dataMax) + 100))
		if s.noteSpace(n); n.core != c || c.role != Leader {
			return
		}
	}
	if c.role == Leader && !c.hasRoom() && !c.outOfSpace() || c.role != Leader && c.leader == 0 {
		return
	}
	leader := s.peer(c, c.leader)
	if c.role != Leader && leader == nil {
		return // it leads on its way out
	}
	var b entryBuilder
	props := l.draw(s, &b)
	if len(props) == 0 {
		return
	}
	if c.outOfSpace() {
		s.losses.Rejected += len(props)
		l.settleAll(s, props, ErrDiskFull)
		return
	}
	if c.role == Leader {
		if c = s.begin(n); c.room < int64(len(b.buf))+saveOverhead {
			s.fail("leader %d has room for %d bytes after it has claimed more than %d, and its disk is not full", n.i, c.room, len(b.buf))
		}
		first, ok := c.propose(&b)
		if !ok {
			s.fail("leader %d does not take a proposal", n.i)
		}
		settled, _ := n.wait.add(first, props)
		l.settle(s, settled)
		s.end(n)
		return
	}
	n.wait.forwardBegins()
	call := &simCall{kind: callForward, from: n.i, to: leader.i, toID: c.leader, toDisk: leader.disks, fromRun: n.run,
		forward: &forwardArgs{From: c.self, Count: len(props), Encoded: b.buf}, batch: &simBatch{props: props}}
	l.calls = append(l.calls, call)
	s.transmit(&simMsg{call: call})
	s.push(simEvent{at: s.now + s.someTimeouts(0.5, 4), kind: evForwardTimeout, node: n.i, run: n.run, msg: &simMsg{call: call}})
}

// draw makes up what a client asks for at once.
func (l *simClients) draw(s *sim, b *entryBuilder) (props []*Proposal) {
	w := &s.swarm
	for range s.between(1, w.batchMax) {
		if len(l.sessions) > 0 && s.chance(w.sessionP) {
			props = l.useSession(s, b, props)
			continue
		}
		op := l.newOp(s)
		l.byProp[op.p] = op
		b.add(entryCommand, simCommand(op.id, op.key, op.write, s.rng.IntN(w.dataMax+1)))
		props = append(props, op.p)
	}
	return props
}

// lag returns how many entries the longest log has that some node lacks: those
// it must still be sent to become equal.
func (s *sim) lag() Index {
	lo, hi := ^Index(0), Index(0)
	for _, n := range s.nodes {
		if n.lost != "" || !s.isMember(n) {
			continue
		}
		lo, hi = min(lo, s.book.durableCommitted(n)), max(hi, n.disk.last())
		if n.core != nil {
			hi = max(hi, n.core.log.last)
		}
	}
	return hi - lo
}

// onForwarded takes another node's proposals.
func (s *sim) onForwarded(n *simNode, call *simCall) {
	c := n.core
	r := &forwardReply{Leader: c.leader, Refusal: c.refusal(call.forward.From)}
	var b entryBuilder
	if r.Refusal == forwardAccepted && n.roomShort(len(call.forward.Encoded)) {
		r.Refusal = forwardBusy
	}
	if r.Refusal == forwardAccepted {
		if err := b.addUnsealed(call.forward.Encoded); err != nil {
			s.fail("forwarded proposals: %v", err)
		}
		r.First = s.begin(n).proposeFor(call.forward.From, &b)
		run := n.run
		s.end(n)
		if n.run != run || n.core == nil {
			return
		}
		s.begin(n).onForward(call.forward.From, r.First.Index+Index(call.forward.Count)-1)
		s.end(n)
		if n.run != run || n.core == nil {
			return
		}
	}
	if n.disk.hard.Term < r.First.Term {
		s.fail("9 node %d answers a forward in term %d, its disk has term %d", n.i, r.First.Term, n.disk.hard.Term)
	}
	s.transmit(&simMsg{call: call, isReply: true, forwardReply: r})
}

// roomShort tells whether the disk has no room for n bytes of entries.
func (n *simNode) roomShort(bytes int) bool {
	if n.wal == nil {
		return false
	}
	n.wal.storage.Claim(int64(bytes) + saveOverhead)
	room, _ := n.wal.storage.Room()
	return room < int64(bytes)+saveOverhead
}

// forwardEnds takes the leader's answer to a forward, or gives it up.
func (l *simClients) forwardEnds(s *sim, n *simNode, call *simCall, r *forwardReply) {
	if call.batch.ended {
		return
	}
	call.batch.ended = true
	props := call.batch.props
	switch {
	case r == nil:
		l.settleAll(s, props, outcomeUnknown(errors.New("no answer")))
	case r.Refusal != forwardAccepted:
		l.settleAll(s, props, ErrNoLeader)
	default:
		settled, _ := n.wait.add(r.First, props)
		l.settle(s, settled)
	}
	n.wait.forwardEnds()
	if n.core != nil {
		n.core.want(n.wait.highest())
	}
}

func (l *simClients) nodeStopped(s *sim, n *simNode) {
	kept := l.calls[:0]
	for _, c := range l.calls {
		if c.from == n.i && c.fromRun == n.run {
			l.forwardEnds(s, n, c, nil)
		}
		if !c.batch.ended {
			kept = append(kept, c)
		}
	}
	clear(l.calls[len(kept):])
	l.calls = kept
}

func (l *simClients) settleAll(s *sim, props []*Proposal, err error) {
	for _, p := range props {
		p.err = err
	}
	l.settle(s, props)
}

// settle takes the outcomes of proposals and checks them.
func (l *simClients) settle(s *sim, props []*Proposal) {
	for _, p := range props {
		op := l.byProp[p]
		delete(l.byProp, p)
		if op != nil && op.session != nil {
			l.attemptEnds(s, op, p)
			continue
		}
		if op == nil || op.state != opWaiting {
			s.fail("a proposal was settled twice: %+v", op)
		}
		op.returned = s.now
		switch {
		case p.err == nil:
			op.state = opAnswered
			l.answer(s, op, p.result)
		case errors.Is(p.err, ErrOutcomeUnknown):
			op.state = opUnknown
			l.unknown++
		default:
			op.state = opRejected
			if op.committed != 0 {
				s.fail("20 command %d was rejected (%v) and is committed as entry %d", op.id, p.err, op.committed)
			}
		}
	}
}

// answer checks linearizability with the log's order as the witness: the
// result is what the log says at that place, and the place is after everything
// that was answered before this command began.
func (l *simClients) answer(s *sim, op *simOp, r Result) {
	l.answered++
	if op.committed != r.Index {
		s.fail("21 command %d was answered with entry %d, it is committed as entry %d", op.id, r.Index, op.committed)
	}
	want := &s.book.committed[r.Index-1]
	if want.term != r.Term || string(want.result) != string(r.Data) {
		s.fail("21 command %d at entry %d was answered %x of term %d, the log says %x of term %d", op.id, r.Index, r.Data, r.Term, want.result, want.term)
	}
	if r.Index <= op.floor {
		s.fail("21 command %d became entry %d, but entry %d was answered before it began", op.id, r.Index, op.floor)
	}
	op.value = binary.LittleEndian.Uint64(r.Data)
	l.newest = max(l.newest, r.Index)
}

// committed is told of every command that commits and is executed.
func (l *simClients) committed(s *sim, i Index, data []byte) {
	op := l.ops[binary.LittleEndian.Uint64(data)-1]
	if op.committed != 0 {
		s.fail("19 command %d is committed as entries %d and %d", op.id, op.committed, i)
	}
	if op.state == opRejected {
		s.fail("20 command %d was rejected (%v), then committed as entry %d", op.id, op.p.err, i)
	}
	op.committed = i
}
