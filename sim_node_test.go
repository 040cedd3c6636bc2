package raft

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// simNode is one server: what survives a crash, and the current run of it.
type simNode struct {
	s      *sim
	i      int
	name   NodeID
	disks  int  // counts its disks: one that left may come back with an empty one
	left   Term // of the leader that last committed a configuration without it
	limits limits
	disk   *simDisk // survives crashes as far as it was flushed
	wal    *simWAL  // the real log beside it, nil in most seeds
	snaps  nodeSnapshots

	run        uint32 // counts starts; events of an earlier run are void
	core       *core  // nil while down
	box        outbox
	wait       pending
	machine    simMachine
	sessions   *sessionTable
	applied    Index
	applying   bool
	flushing   bool
	beating    bool
	timerAt    time.Duration // of the newest timer event
	crashIn    int           // boundaries left until the crash, 0 if none is armed
	released   []message     // scratch
	restarting bool
	led        []EntryID // no-ops of the terms it has led since it started
	restartSeq LSN
	suspect    bool   // bits of its disk have rotted
	lost       string // why it never runs again in this run of the simulator

	pausedUntil time.Duration
	hungUntil   time.Duration // its disk hangs until then
	deferred    []simEvent
	clockRate   float64 // local seconds per second since clockAt
	clockBase   time.Duration
	clockAt     time.Duration
	asleep      bool // the machine is suspended: its clock stands still
	sleepsSince time.Duration
	sleptFor    time.Duration // by its own clock
	promised    time.Time     // by its own clock, the end of what it has promised and told of
	seenSaved   time.Duration // length of a promise on its disk when that was last looked at

	before      coreSnapshot
	truncations uint64
	seenMatch   map[memberID]Index
	seenDurable Index
	maxTermSent Term // over all runs: what others may have seen
}

func newSimNode(s *sim, i int, first Entries) *simNode {
	n := &simNode{s: s, i: i, name: simName(i), disk: newSimDisk(first), clockRate: 1}
	var base *limits
	if i > 0 {
		base = &s.nodes[0].limits
	}
	n.limits = s.drawLimits(s.seed%3 != 0, base)
	if s.swarm.wal {
		n.wal = newSimWAL(s, n)
		n.wal.begin(s, first)
	}
	n.clockBase = time.Duration(s.rng.Int64N(int64(2 * time.Hour)))
	n.seenMatch = map[memberID]Index{}
	return n
}

func (s *sim) localNow(n *simNode) time.Time {
	at := s.now
	if n.asleep {
		at = n.sleepsSince
	}
	return simEpoch.Add(n.clockBase + time.Duration(float64(at-n.clockAt)*n.clockRate))
}

// boot starts a run of the node from what its disk recovers.
func (s *sim) boot(n *simNode) {
	n.restarting = false
	var rec Recovered
	if n.wal != nil {
		var ok bool
		if rec, ok = s.recover(n); !ok {
			return
		}
	} else if n.suspect {
		s.loses(n, "its disk has rotted: it refuses to start")
		return
	} else {
		rec, _ = n.disk.Open(context.Background(), Identity{})
		rec.Tail = n.disk.tail(s.rng.IntN(4096))
	}
	from, ok := s.bootSnapshots(n, &rec)
	if !ok {
		return
	}
	var conf configuration
	if rec.Config != nil {
		var err error
		if conf, err = decodeConfiguration(rec.Config); err != nil {
			s.fail("node %d: %v", n.i, err)
		}
	}
	for _, first := range n.led {
		if first.Term > rec.HardState.Term {
			s.book.unsay(first.Index, first.Term)
		}
	}
	n.led = nil
	defer s.back(s.turn(turnBoot, n.i))
	n.run++
	n.box, n.wait = outbox{}, pending{maxKept: 4096}
	n.applying, n.flushing, n.beating, n.timerAt = false, false, false, 0
	n.pausedUntil, n.deferred, n.crashIn = 0, nil, 0
	s.wake(n)
	n.seenDurable = rec.Last
	dice := rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))
	s.changeLease(n)
	n.core = newCore(rec.ownNumber(n.name, simDirectory(n.i, n.disks)), n.limits, rec, conf, dice, s.localNow(n))
	n.core.name, n.core.directory = n.name, simDirectory(n.i, n.disks)
	s.keepsPromises(n, rec.HardState.LeasePromise)
	s.book.started(s, n)
	if n.core.savedPromise > 0 {
		s.reads.withheld++
	}
	s.note(n.i, "starts with term %d vote %d log %v..%d snapshot %v", rec.HardState.Term, rec.HardState.VotedFor, rec.Start, rec.Last, n.snaps.newest.Last)
	c := s.begin(n)
	if from != nil {
		n.wait.applied, n.wait.term = from.Last.Index, from.Last.Term
		c.restored(from)
	}
	s.end(n)
}

// begin sets the scene for one transition of the core; end hands its effects on.
func (s *sim) begin(n *simNode) *core {
	n.before, n.truncations = n.core.snapshot(), n.core.log.truncations
	s.setTime(n)
	if n.wal != nil && n.wal.storage != nil {
		n.core.room, _ = n.wal.storage.Room()
	}
	s.steps++
	return n.core
}

func (s *sim) end(n *simNode) {
	c, run := n.core, n.run
	out := c.finish()
	if err := c.checkStep(n.before); err != nil {
		s.fail("node %d: %v", n.i, err)
	}
	for _, e := range out.events {
		switch {
		case e.Kind == EventStuck:
			s.losses.Yielded++
		case e.Kind == EventElected && !c.fit():
			s.losses.Needed++
		}
		s.record(simRecord{at: s.now, node: n.i, ev: e})
	}
	s.book.transition(s, n, &out)
	s.readAnswered(n, out.answers)
	if out.save != nil {
		if s.boundary(n) {
			return
		}
		n.appendDisk(*out.save)
		if s.boundary(n) {
			return
		}
	}
	if c.role == Dead {
		n.box.drop()
		s.load.settle(s, firstOf(n.wait.stop(outcomeUnknown(ErrStopped))))
		return
	}
	n.box.add(out.msgs)
	s.release(n)
	if n.run != run || n.core == nil {
		return
	}
	s.releaseBlocks(n)
	s.sendSnapshots(n, out.snapshots)
	for _, to := range out.hangups {
		s.hangups++
		if o := s.peer(c, to); o != nil {
			s.breakLink(n.i, o.i)
		}
	}
	for _, q := range out.reads {
		before := s.turn(turnRead, n.i)
		d := time.Duration(s.rng.Int64N(int64(2*s.swarm.readMean) + 1))
		if s.strikes(faultReadSlow, n.i, s.swarm.readTailP) {
			d += s.someTimeouts(0.1, 10)
		}
		s.back(before)
		if !s.faulty {
			d = s.swarm.timeout / 1000
		}
		// The disk is read now and the answer takes its time, so that it may be old.
		entries, err := n.readDisk(q.lo, q.hi, q.maxBytes)
		if err != nil && !s.mayFail(n, err) {
			s.fail("node %d asks for entries %d to %d: %v", n.i, q.lo, q.hi, err)
		}
		s.push(simEvent{at: s.now + d, kind: evRead, node: n.i, run: n.run, read: &simRead{q, entries, err}})
	}
	s.startFlush(n)
	s.armTimer(n)
	if c.role == Leader && !n.beating {
		n.beating = true
		s.push(simEvent{at: s.now + n.limits.heartbeatInterval, kind: evHeartbeat, node: n.i, run: n.run})
	}
	s.scheduleApply(n)
}

func firstOf(ps []*Proposal, _ []chan struct{}) []*Proposal { return ps }

// release sends what may leave, looking at each message on its way.
func (s *sim) release(n *simNode) {
	c, run := n.core, n.run
	msgs := n.box.release(n.released[:0], c.durableLSN, c.currentTerm, c.hardLSN)
	for _, m := range msgs {
		if s.boundary(n) || n.run != run {
			return
		}
		s.book.leaves(s, n, &m)
		if m.token != nil {
			s.sendReply(m)
		} else {
			s.sendRequest(n, m)
		}
	}
	clear(msgs)
	n.released = msgs[:0]
}

func (s *sim) armTimer(n *simNode) {
	if n.core == nil || n.core.role == Dead || n.core.electionDeadline.IsZero() {
		return
	}
	left := time.Duration(float64(n.core.electionDeadline.Sub(s.localNow(n))) / n.clockRate)
	at := max(s.now+left, s.now+1)
	if n.timerAt <= s.now || at < n.timerAt {
		n.timerAt = at
		s.push(simEvent{at: at, kind: evTimer, node: n.i, run: n.run})
	}
}

func (s *sim) startFlush(n *simNode) {
	if n.flushing || n.core.role == Dead || n.core.lsn == n.core.durableLSN {
		return
	}
	n.flushing = true
	defer s.back(s.turn(turnFlush, n.i))
	w := &s.swarm
	d := w.timeout / 1000
	if s.faulty {
		d = time.Duration(s.rng.Int64N(int64(2*w.flushMean) + 1))
		if s.strikes(faultFlushSlow, n.i, w.flushTailP) {
			d += s.someTimeouts(0.05, 5)
		}
	}
	s.push(simEvent{at: s.now + d, kind: evFlushed, node: n.i, run: n.run, lsn: n.core.lsn, took: d})
}

func (s *sim) scheduleApply(n *simNode) {
	if n.applying || n.core.role == Dead || n.core.applyFailed || n.core.commitIndex <= n.applied {
		return
	}
	n.applying = true
	defer s.back(s.turn(turnApply, n.i))
	d := s.swarm.timeout / 1000
	if s.faulty {
		d = time.Duration(s.rng.Int64N(int64(2*s.swarm.applyMean) + 1))
	}
	s.push(simEvent{at: s.now + d, kind: evApply, node: n.i, run: n.run})
}

// onNode performs an event of a running node.
func (s *sim) onNode(n *simNode, e simEvent) {
	switch e.kind {
	case evTimer:
		if e.at < n.timerAt {
			return
		}
		n.timerAt = 0
		s.begin(n).tick()
		s.end(n)
	case evHeartbeat:
		if n.beating = n.core.role == Leader; n.beating {
			s.push(simEvent{at: s.now + n.limits.heartbeatInterval, kind: evHeartbeat, node: n.i, run: n.run})
			s.begin(n).heartbeat()
			s.end(n)
		}
	case evRequest:
		s.onRequest(n, e.msg.call)
	case evReply:
		s.onReply(n, e.msg)
	case evAppendFailed:
		s.begin(n).onAppendFailed(e.msg.call.toID, e.msg.call.append)
		s.end(n)
	case evFlushed:
		s.onFlushed(n, e)
	case evRead:
		if e.read.err != nil {
			s.diskFails(n, e.read.err)
			return
		}
		s.begin(n).entriesRead(e.read.entryRequest, e.read.entries)
		s.end(n)
	case evApply:
		s.onApply(n)
	case evThen:
		e.then()
	case evForwardTimeout:
		s.load.forwardEnds(s, n, e.msg.call, nil)
	}
}

func (s *sim) onRequest(n *simNode, call *simCall) {
	switch call.kind {
	case callVote:
		s.begin(n).onVoteRequest(call.vote, call)
		s.end(n)
	case callAppend, callHeartbeat:
		n.claim(call.append)
		c := s.begin(n)
		if call.heard.IsZero() {
			call.heard = c.now
		}
		c.onAppendRequest(call.append, call)
		s.end(n)
	case callForward:
		s.onForwarded(n, call)
	case callSnapshot:
		s.onBlock(n, call)
	}
}

func (s *sim) onReply(n *simNode, m *simMsg) {
	call := m.call
	from := call.toID
	if m.appendReply != nil {
		m.appendReply.directory = simDirectory(call.to, call.toDisk)
	}
	switch call.kind {
	case callVote:
		s.begin(n).onVoteReply(from, call.vote, m.voteReply)
	case callAppend:
		if !m.appendReply.Success && m.appendReply.Term == call.append.Term {
			s.refused++
		}
		// A broken connection brings no answer any more.
		if call.settled && call.link != s.link(call.from, call.to).conn {
			return
		}
		call.settled = true
		s.begin(n).onAppendReply(from, call.append, m.appendReply)
	case callHeartbeat:
		if !m.appendReply.Success && m.appendReply.Term == call.append.Term {
			s.refused++
		}
		s.begin(n).onAppendReply(from, call.append, m.appendReply)
	case callForward:
		s.load.forwardEnds(s, n, call, m.forwardReply)
		return
	case callSnapshot:
		call.transfer.answered(call, m.snapshotReply)
		return
	}
	s.end(n)
}

var errSimDisk = errors.New("input/output error")

func (s *sim) onFlushed(n *simNode, e simEvent) {
	n.flushing = false
	if n.core.role == Dead {
		return
	}
	if s.boundary(n) {
		return
	}
	if s.now < n.hungUntil {
		n.flushing = true
		e.at, e.took = n.hungUntil, e.took+n.hungUntil-s.now
		s.push(e)
		return
	}
	lsn, err := n.flushDisk(e.lsn)
	if errors.Is(err, errSimPower) {
		s.crashAndRestart(n)
		return
	}
	if errors.Is(err, ErrDiskFull) { // nothing was written: it is tried again
		s.losses.FullWrites++
		n.flushing = true
		e.at, e.lsn = s.now+s.swarm.timeout/4, n.core.lsn
		s.push(e)
		s.noteSpace(n)
		return
	}
	if err != nil {
		s.diskFails(n, err)
		return
	}
	s.book.diskChanged(s, n)
	if s.boundary(n) {
		return
	}
	s.begin(n).persisted(lsn, e.took)
	if s.end(n); n.core != nil && n.core.role != Dead {
		s.noteSpace(n)
	}
}

// diskFails ends a node whose disk has failed it.
func (s *sim) diskFails(n *simNode, err error) {
	s.note(n.i, "the disk fails: %v", err)
	if n.core.role != Dead {
		s.begin(n).die(err)
		s.end(n)
	}
	// The process may linger, dead, before its supervisor restarts it.
	s.restartAfter(n, s.someTimeouts(0.01, 5))
}

// simRead is the answer to a request for entries that are on disk only.
type simRead struct {
	entryRequest
	entries []Entries
	err     error
}

func (s *sim) onApply(n *simNode) {
	n.applying = false
	c := n.core
	if c.role == Dead || c.applyFailed || c.commitIndex <= n.applied {
		return
	}
	if c.log.start.Index > n.applied {
		s.restoreReplaced(n)
		return
	}
	limit := 1 + s.rng.IntN(8192)
	lo := n.applied + 1
	runs, ok := c.log.from(lo, c.commitIndex, limit)
	if !ok {
		var err error
		if runs, err = n.readDisk(lo, min(c.commitIndex, c.log.firstInMemory()-1), limit); err != nil {
			if !s.mayFail(n, err) {
				s.fail("node %d can't read committed entry %d: %v", n.i, lo, err)
			}
			s.diskFails(n, err)
			return
		}
	}
	var settled []*Proposal
	for _, e := range runs {
		results := s.applyRun(n, e)
		settled, _ = n.wait.onApplied(e, results, settled, nil)
		n.snaps.noted(e)
	}
	c.applyEnds(n.applied)
	s.load.settle(s, settled)
	c.want(n.wait.highest())
	s.scheduleApply(n)
	if s.faulty && s.chance(s.swarm.snapshotP) {
		s.takeSnapshot(n)
	}
}

// applyRun applies a run of entries as a server's applier does.
func (s *sim) applyRun(n *simNode, e Entries) outcomes {
	results := outcomes{data: make([][]byte, e.Len())}
	for from := 0; from < e.Len(); {
		var p portion
		n.sessions.plan(e, from, &p)
		next := 0
		for ; from < p.to; from++ {
			var cmd []byte
			if next < len(p.at) && p.at[next] == from {
				cmd = p.commands[next].Data
				next++
			}
			results.data[from] = s.book.applied(s, n, e, from, cmd)
		}
		n.sessions.executed(&p, results.data)
		results.sessions = append(results.sessions, p.sessions...)
	}
	s.book.sessionsAgree(s, n, e, &results)
	return results
}

// boundary is a point at which a crash may have been armed. It returns true
// if the node is gone.
func (s *sim) boundary(n *simNode) bool {
	if n.crashIn == 0 {
		return false
	}
	if n.crashIn--; n.crashIn > 0 {
		return false
	}
	s.note(n.i, "crashes at a boundary")
	s.crashAndRestart(n)
	return true
}

func (s *sim) armCrash(n *simNode) {
	if n.crashIn == 0 && s.strikes(faultCrash, n.i, s.swarm.boundaryP*0.004) {
		s.unnamed = len(s.struck)
		n.crashIn = s.between(1, 12)
		s.note(n.i, "a crash is armed, %d boundaries from here", n.crashIn)
	}
}

// crash ends a run. What was not flushed is lost, except for a prefix of it
// that may have made it to the disk.
func (s *sim) crash(n *simNode) {
	n.restartSeq++
	n.restarting = false
	if n.core == nil {
		return
	}
	s.load.settle(s, firstOf(n.wait.stop(outcomeUnknown(ErrStopped))))
	s.load.nodeStopped(s, n)
	n.core = nil
	n.run++
	n.crashDisk()
	s.book.diskChanged(s, n)
	for i := range s.nodes {
		own := s.link(n.i, i)
		own.outstanding = own.outstanding[:0]
		own.conn++
		if s.chance(0.5) { // otherwise the peers find out by themselves
			s.breakLink(i, n.i)
			s.seesClosed(s.nodes[i], n)
		}
	}
}

func (s *sim) crashAndRestart(n *simNode) {
	if n.core == nil {
		return
	}
	s.note(n.i, "crashes")
	s.crash(n)
	s.restartAfter(n, s.someTimeouts(0.001, 6))
}

// restartAfter starts the node again; a dead process ends first.
func (s *sim) restartAfter(n *simNode, d time.Duration) {
	if n.lost != "" {
		return
	}
	n.restarting = true
	n.restartSeq++
	s.push(simEvent{at: s.now + d, kind: evRestart, node: n.i, lsn: n.restartSeq})
}

// campaign lets a node stand for election without waiting for a timeout, as the
// target of a leadership transfer does. Leaderships then become short, and
// leave entries behind that only some nodes have.
func (s *sim) campaign(n *simNode) {
	c := n.core
	if c == nil || c.role == Leader || c.role == Dead || n.pausedUntil > s.now || !c.configuration.voter(c.self) || c.removed {
		return
	}
	if s.swarm.lease > 0 {
		s.campaignByLease(n)
		return
	}
	s.note(n.i, "campaigns at once")
	s.begin(n).becomeCandidate(ReasonTransfer)
	s.end(n)
}
