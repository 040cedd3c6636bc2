package raft

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

type simCallKind uint8

const (
	callVote simCallKind = iota
	callAppend
	callHeartbeat
	callForward
	callSnapshot
)

// simCall is a request and what its sender remembers of it.
type simCall struct {
	kind     simCallKind
	from, to int
	toID     memberID // whom the sender takes it for
	toDisk   int
	fromRun  uint32
	link     uint64 // the connection it was sent on
	vote     *voteArgs
	append   *appendArgs
	forward  *forwardArgs
	snapshot *snapshotArgs
	transfer *simTransfer // of a snapshot
	batch    *simBatch    // of a forward
	settled  bool         // an append was answered or failed
	heard    time.Time    // when it came first, by the receiver's clock
}

// simMsg is a request or a reply under way.
type simMsg struct {
	call          *simCall
	isReply       bool
	voteReply     *voteReply
	appendReply   *appendReply
	forwardReply  *forwardReply
	snapshotReply *snapshotReply // nil: the receiver failed
}

func (m *simMsg) String() string {
	c := m.call
	dir := fmt.Sprintf("%d->%d ", c.from, c.to)
	switch {
	case c.kind == callVote && m.isReply:
		return dir + fmt.Sprintf("vote %+v answered %+v", *c.vote, *m.voteReply)
	case c.kind == callVote:
		return dir + fmt.Sprintf("vote %+v", *c.vote)
	case c.kind == callForward:
		return dir + "forward"
	case c.kind == callSnapshot:
		a := c.snapshot
		return dir + fmt.Sprintf("block of %d bytes at %d of %d of a snapshot up to %v, term %d, answered %+v", len(a.Data), a.Offset, a.Size, a.Meta.Last, a.Term, m.snapshotReply)
	}
	a := c.append
	what := fmt.Sprintf("append term %d seq %d prev %v last %d commit %d", a.Term, a.Seq, a.Prev, a.lastIndex(), a.Commit)
	if a.Heartbeat {
		what = fmt.Sprintf("heartbeat term %d prev %v commit %d", a.Term, a.Prev, a.Commit)
	}
	if m.isReply {
		what += fmt.Sprintf(" answered %+v", *m.appendReply)
	}
	return dir + what
}

// simLink is the one-way path from one node to another.
type simLink struct {
	cut         bool
	clogged     time.Duration // nothing arrives before this time
	conn        uint64        // the current append connection
	lastArrival time.Duration // of a request on it, where order is kept
	outstanding []*simCall
}

func (s *sim) link(from, to int) *simLink { return &s.links[from*len(s.nodes)+to] }

// transmit puts a message on its way, if the faults let it.
func (s *sim) transmit(m *simMsg) {
	c := m.call
	from, to := c.from, c.to
	if m.isReply {
		from, to = to, from
	}
	l := s.link(from, to)
	if l.cut {
		return
	}
	path := from*len(s.nodes) + to
	defer s.back(s.turn(turnMessage, path))
	if s.strikes(faultDrop, path, s.swarm.dropP) {
		return
	}
	if c.kind == callAppend && s.strikes(faultBreak, path, s.swarm.breakP) {
		s.breakLink(c.from, c.to)
		return
	}
	if c.kind != callForward && s.strikes(faultDuplicate, path, s.swarm.dupP) { // a forward is not idempotent, and is sent once
		s.deliverAfter(l, m, from, to)
	}
	s.deliverAfter(l, m, from, to)
}

func (s *sim) deliverAfter(l *simLink, m *simMsg, from, to int) {
	at := max(s.now+s.delay(m, from*len(s.nodes)+to), l.clogged)
	e := simEvent{kind: evRequest, node: to, msg: m, epoch: s.netEpoch}
	if m.isReply {
		e.kind, e.run = evReply, m.call.fromRun
	} else if m.call.kind == callAppend && (s.swarm.ordered || !s.faulty) {
		at = max(at, l.lastArrival)
		l.lastArrival = at
	}
	e.at = at
	s.push(e)
}

func (s *sim) delay(m *simMsg, path int) time.Duration {
	w := &s.swarm
	if !s.faulty {
		return time.Duration(float64(w.timeout) * (0.001 + 0.004*s.rng.Float64()))
	}
	d := w.delayMin + time.Duration(s.rng.Int64N(int64(2*w.delayMean)))
	if s.strikes(faultDelay, path, w.tailP) {
		d += s.someTimeouts(0.01, 4)
	}
	late := m.isReply || m.call.kind == callSnapshot || w.lease > 0 && m.call.append != nil && m.call.append.Campaign
	if late && s.strikes(faultOldReply, path, w.oldP) {
		d += s.someTimeouts(0.1, 30)
	}
	return d
}

// breakLink ends the append connection: what is unanswered on it fails.
// Requests that are under way may still arrive, their answers do not.
func (s *sim) breakLink(from, to int) {
	l := s.link(from, to)
	l.conn++
	l.lastArrival = 0
	for _, c := range l.outstanding {
		if !c.settled {
			c.settled = true
			d := time.Duration(s.rng.Int64N(int64(s.swarm.delayMin) + 1))
			s.push(simEvent{at: s.now + d, kind: evAppendFailed, node: from, run: c.fromRun, msg: &simMsg{call: c}, epoch: s.netEpoch})
		}
	}
	l.outstanding = l.outstanding[:0]
}

// seesClosed tells n that all connections from another node were closed there,
// unless nothing gets through. That may be wrong: they may have broken only.
func (s *sim) seesClosed(n, from *simNode) {
	if n == from || n.core == nil || s.link(from.i, n.i).cut {
		return
	}
	s.push(simEvent{at: s.now + s.swarm.delayMin, kind: evThen, node: n.i, run: n.run, then: func() {
		if m := n.core.configuration.byName(from.name); m != nil {
			s.begin(n).leaderLeft(m.id)
			s.end(n)
		}
	}})
}

// sendRequest turns a message of the core into a call.
func (s *sim) sendRequest(n *simNode, m message) {
	o := s.peer(n.core, m.to)
	if o == nil {
		return // it has left meanwhile: there is nobody to dial
	}
	to := o.i
	c := &simCall{from: n.i, to: to, toID: m.to, toDisk: o.disks, fromRun: n.run, vote: m.vote, append: m.append}
	if m.append != nil {
		c.kind = callHeartbeat
		if !m.append.Heartbeat {
			c.kind = callAppend
			l := s.link(n.i, to)
			c.link = l.conn
			l.outstanding = append(slices.DeleteFunc(l.outstanding, func(o *simCall) bool { return o.settled }), c)
		}
	}
	if !s.acquainted(n, m.to, o) {
		s.breakLink(n.i, to)
		return
	}
	s.transmit(&simMsg{call: c})
}

func (s *sim) sendReply(m message) {
	c := m.token.(*simCall)
	s.transmit(&simMsg{call: c, isReply: true, voteReply: m.voteReply, appendReply: m.appendReply})
}

// The faults that strike at random times, beside those of single messages.
const (
	nemSplit = iota
	nemOneWay
	nemPair
	nemIsolateLeader
	nemClog
	nemBreak
	nemCrash
	nemCrashLeader
	nemCrashAll
	nemPause
	nemClock
	nemSnapshot
	nemHealNet
	nemDeafLeader
	nemCampaign
	nemCampaignMore // drawn twice as often
	nemMinority
	nemRot
	nemWipe
	nemFull
	nemesisCount

	nemHang       = nemesisCount // drawn apart, so that older seeds stay what they were
	nemApplyFails = nemesisCount + 1
)

// nemesis puts one fault into the run.
//
// More than 70 lines: a flat list of faults, a case each.
func (s *sim) nemesis() {
	w := &s.swarm
	s.push(simEvent{at: s.now + 1 + time.Duration(s.rng.Int64N(2*int64(w.nemesisEvery))), kind: evNemesis, epoch: uint32(s.round)})
	if !s.strikes(faultNemesis, 0, 1) {
		return
	}
	s.unnamed = len(s.struck)
	f := w.nemeses[s.rng.IntN(len(w.nemeses))]
	if s.chance(0.2) {
		f = nemHealNet
	}
	if s.chance(0.15) {
		f = nemSnapshot
	}
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	leader := s.highestLeader()
	if leader != nil && (f == nemIsolateLeader || f == nemCrashLeader || f == nemDeafLeader || s.chance(0.3)) {
		n = leader
	}
	f = s.feasible(f, n)
	s.mix(uint64(f))
	switch f {
	case nemSplit:
		side := make([]bool, len(s.nodes))
		for i := range side {
			side[i] = s.chance(0.5)
		}
		s.cutWhere(func(a, b int) bool { return side[a] != side[b] })
		s.note(-1, "partition %v", side)
	case nemMinority:
		s.isolateMinority(n)
	case nemOneWay:
		m := s.rng.IntN(len(s.nodes))
		s.link(n.i, m).cut = true
		s.note(-1, "cut %d->%d", n.i, m)
	case nemPair:
		m := s.rng.IntN(len(s.nodes))
		s.link(n.i, m).cut, s.link(m, n.i).cut = true, true
		s.note(-1, "cut %d-%d", n.i, m)
	case nemIsolateLeader:
		s.cutWhere(func(a, b int) bool { return a == n.i || b == n.i })
		s.note(-1, "isolate %d", n.i)
	case nemDeafLeader:
		s.cutWhere(func(a, b int) bool { return b == n.i })
		s.note(-1, "%d hears nothing", n.i)
	case nemHealNet:
		s.cutWhere(func(a, b int) bool { return false })
		s.note(-1, "heal the network")
	case nemClog:
		d := s.someTimeouts(0.2, 10)
		for i := range s.links {
			if i/len(s.nodes) == n.i || i%len(s.nodes) == n.i {
				if s.chance(0.5) {
					s.links[i].clogged = s.now + d
				}
			}
		}
		s.note(n.i, "clogged for %v", d)
	case nemBreak:
		for i := range s.nodes {
			if s.chance(0.5) {
				s.breakLink(n.i, i)
				s.seesClosed(s.nodes[i], n)
			}
		}
		s.note(n.i, "connections break")
	case nemPause:
		n.pausedUntil = s.now + s.someTimeouts(0.1, 8)
		s.push(simEvent{at: n.pausedUntil, kind: evResume, node: n.i})
		if w.lease > 0 && s.chance(0.5) {
			s.fallAsleep(n)
			s.reads.sleeps++
		}
		s.note(n.i, "paused until %v, its machine asleep: %v", n.pausedUntil, n.asleep)
	case nemClock:
		jump, rate := s.someTimeouts(0.01, 2), 0.9+0.2*s.rng.Float64()
		if w.lease > 0 {
			jump, rate = 0, s.drawRate()
		}
		s.setClock(n, jump, rate)
		s.armTimer(n)
		s.note(n.i, "clock jumps by %v and runs at %.3f", jump, rate)
	case nemSnapshot:
		s.takeSnapshot(n)
	case nemCampaign, nemCampaignMore:
		s.campaign(n)
	case nemRot:
		s.rot(n)
	case nemWipe:
		s.wipe(n)
	case nemFull:
		s.fill(n)
	case nemApplyFails:
		s.applyFails(n)
	case nemHang:
		s.hang(n)
	case nemCrash, nemCrashLeader:
		s.crashAndRestart(n)
	case nemCrashAll:
		for _, n := range s.nodes {
			s.crashAndRestart(n)
		}
	}
}

// isolateMinority cuts off the leader, or n, with a few others: what they append
// to one another is lost to the majority.
func (s *sim) isolateMinority(n *simNode) {
	if l := s.highestLeader(); l != nil {
		n = l
	}
	side := make([]bool, len(s.nodes))
	side[n.i] = true
	for k := (s.swarm.voters-1)/2 - 1; k > 0; k-- {
		side[s.rng.IntN(len(s.nodes))] = true
	}
	s.cutWhere(func(a, b int) bool { return side[a] != side[b] })
	s.note(-1, "minority %v", side)
}

func (s *sim) someTimeouts(lo, hi float64) time.Duration {
	return time.Duration(s.logUniform(lo, hi) * float64(s.swarm.timeout))
}

func (s *sim) cutWhere(cut func(from, to int) bool) {
	for i := range s.links {
		s.links[i].cut = cut(i/len(s.nodes), i%len(s.nodes))
	}
}

func (s *sim) highestLeader() (best *simNode) {
	for _, n := range s.nodes {
		if n.core != nil && n.core.role == Leader && (best == nil || n.core.currentTerm > best.core.currentTerm) {
			best = n
		}
	}
	return best
}

// phase heals a random majority after a round of faults, and checks ten
// election timeouts later at the latest, that it works again.
func (s *sim) phase() {
	if s.faulty {
		s.heal()
		return
	}
	if s.healed() {
		took := float64(s.now-s.phaseStarted) / float64(s.swarm.timeout)
		s.healTimes = append(s.healTimes, took)
		s.note(-1, "healed after %.2f election timeouts", took)
		if s.round >= s.swarm.rounds {
			s.done = true
			return
		}
		s.beginFaults()
		return
	}
	patience := 10 * s.swarm.timeout
	if s.now-s.phaseStarted > patience {
		s.fail("liveness: %v after healing nodes %v: %s", patience, s.core, s.describe())
	}
	s.push(simEvent{at: s.now + s.swarm.timeout/20, kind: evPhase})
}

// heal keeps a random majority, stops all faults there and leaves the rest dead.
func (s *sim) heal() {
	s.faulty = false
	s.phaseStarted = s.now
	s.netEpoch++ // connections are new; what was unanswered on the old ones stays so
	for i := range s.links {
		s.links[i].cut, s.links[i].clogged, s.links[i].lastArrival = false, 0, 0
	}
	// Disks are quick again, also with what they were asked for before.
	for i := range s.heap {
		if e := &s.heap[i]; e.kind == evFlushed || e.kind == evRead || e.kind == evThen {
			e.at = min(e.at, s.now+s.swarm.timeout/100)
		}
	}
	slices.SortFunc(s.heap, func(a, b simEvent) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.seq, b.seq)) })
	s.turn(turnHeal, 0)
	if s.swarm.spares > 0 {
		s.chooseCore()
	} else {
		order := s.rng.Perm(s.swarm.voters)
		order = slices.DeleteFunc(order, func(i int) bool { return !s.nodes[i].sound() })
		alive := s.between(s.swarm.voters/2+1, len(order))
		for i := range s.core {
			s.core[i] = i >= s.swarm.voters && s.nodes[i].sound() && s.chance(0.7)
		}
		for _, i := range order[:alive] {
			s.core[i] = true
		}
	}
	failed := s.staysFailed()
	for i, n := range s.nodes {
		n.crashIn, n.hungUntil = 0, 0
		s.resume(n)
		s.setClock(n, 0, 1)
		switch {
		case !s.core[i]:
			s.crash(n)
			n.restarting = false
		case n.core == nil || n.core.role == Dead || n.core.applyFailed && n.i != failed:
			s.crash(n)
			s.restartAfter(n, 0)
		default:
			s.armTimer(n)
			s.startFlush(n)
			if s.makeSpace(n); n.core.role != Dead {
				s.noteSpace(n)
			}
		}
	}
	s.note(-1, "heal nodes %v", s.core)
	s.push(simEvent{at: s.now + s.swarm.timeout/20, kind: evPhase})
}

// applyFails ends applying on a node until it is restarted.
func (s *sim) applyFails(n *simNode) {
	if n.core == nil || n.core.role == Dead || n.core.applyFailed {
		return
	}
	s.note(n.i, "its state machine fails")
	s.losses.ApplyFailures++
	s.begin(n).stopApplying(n.applied+1, errSimApply)
	s.load.settle(s, firstOf(n.wait.stop(outcomeUnknown(errSimApply))))
	s.end(n)
}

var errSimApply = errors.New("the simulated state machine fails")

// staysFailed returns a voter of the healed majority whose state machine has
// failed and is not mended, -1 for none. The others must do: the majority may
// need its vote, and what only it has.
func (s *sim) staysFailed() int {
	if s.swarm.spares > 0 || s.swarm.voters < 3 {
		return -1
	}
	for i, n := range s.nodes[:s.swarm.voters] {
		if s.core[i] && n.core != nil && n.core.applyFailed && n.core.role != Dead {
			s.losses.StayedFailed++
			return i
		}
	}
	return -1
}

// healed: a leader that applies has committed an entry of its own term and
// everything before it, and all nodes of the healed majority have the same log,
// committed, and applied unless their state machine has failed.
func (s *sim) healed() bool {
	l := s.highestLeader()
	if l == nil {
		return false
	}
	c := l.core
	if c.applyFailed || c.commitIndex != c.log.last || c.commitIndex < c.firstOfTerm || !s.membersSettled(c) {
		return false
	}
	for i, n := range s.nodes {
		if s.core[i] && c.configuration.byName(n.name) != nil && (n.core == nil || n.core.log.lastID() != c.log.lastID() || n.core.commitIndex != c.commitIndex || n.applied != c.commitIndex && !n.core.applyFailed) {
			return false
		}
	}
	return true
}

func (s *sim) describe() string {
	out := ""
	for _, n := range s.nodes {
		if n.core == nil {
			out += fmt.Sprintf("\n  %d down", n.i)
			continue
		}
		c := n.core
		out += fmt.Sprintf("\n  %d %s members %s term %d leader %d log %v..%v commit %d applied %d durable %d", n.i, c.role, simMemberList(&c.configuration), c.currentTerm, c.leader, c.log.start, c.log.lastID(), c.commitIndex, n.applied, c.durableIndex)
		for _, p := range c.progress {
			out += fmt.Sprintf("\n      to member %d: state %d next %d match %d inflight %d reading %v", p.id, p.state, p.next, p.match, len(p.inflight), p.reading)
		}
	}
	return out
}
