package raft

import "time"

// stamp returns the time for a new entry: wall time, never decreasing along the log.
func (c *core) stamp() time.Time {
	c.noteTime(c.now)
	return c.lastTime
}

// sawTime remembers the time of the last of e, whoever stamped it: a new
// leader's clock may be behind the previous one's.
func (c *core) sawTime(e Entries) {
	if n := e.Len(); n > 0 {
		c.noteTime(e.entry(n - 1).Time)
	}
}

// noteTime keeps later stamps from going back behind at.
func (c *core) noteTime(at time.Time) {
	if at.After(c.lastTime) {
		c.lastTime = at
	}
}

// propose appends commands to the leader's log: §5.3. It returns the first
// entry's ID, and false if this server does not lead.
func (c *core) propose(b *entryBuilder) (EntryID, bool) {
	if c.role != Leader {
		return EntryID{}, false
	}
	first := EntryID{c.log.last + 1, c.currentTerm}
	c.appendLocal(b.seal(first.Index, first.Term, c.stamp()))
	return first, true
}

// refusal says why this server appends no proposals of this member now. The answer to
// a forward names entries by the term, so that must be durable, like a term in
// any other message. A cluster's only voter leads sooner, and after a crash it
// may lead the same term again, with other entries.
func (c *core) refusal(from memberID) forwardRefusal {
	switch {
	case c.role == Dead:
		return forwardStopped
	case c.role != Leader:
		return forwardNotLeader
	case c.outOfSpace():
		return forwardDiskFull
	case !c.takesFrom(from) || !c.termDurable():
		return forwardBusy
	}
	return forwardAccepted
}

// hasRoom tells whether a leader may append more: what is not committed, and
// what is not on its own disk, is bounded.
func (c *core) hasRoom() bool {
	return c.appendsProposals() && c.unsettledBytes() < c.limits.maxUncommittedSize
}

// appendsProposals tells whether a leader appends any, or they wait for whoever
// takes over.
func (c *core) appendsProposals() bool {
	return c.transfer.to == 0 && !c.applyFailed && !c.seeksSuccessor()
}

// takesFrom tells whether a leader takes proposals that a follower forwards: if
// it has room, and otherwise one batch at a time, so that no flood, of the
// leader's own clients or of another follower's, keeps the others out.
func (c *core) takesFrom(follower memberID) bool {
	p := c.progressOf(follower)
	return c.hasRoom() || c.appendsProposals() && p != nil && p.forwarded <= c.settled()
}

// proposeFor is propose for what a follower has forwarded.
func (c *core) proposeFor(follower memberID, b *entryBuilder) EntryID {
	first, ok := c.propose(b)
	if p := c.progressOf(follower); ok && p != nil {
		p.forwarded = c.log.last
	}
	return first
}

// settled is the newest entry that is committed and durable here.
func (c *core) settled() Index { return min(c.commitIndex, c.durableIndex) }

// unsettledBytes are those of entries after it.
func (c *core) unsettledBytes() (n int) {
	settled := c.settled()
	for i := len(c.log.tail) - 1; i >= 0 && c.log.tail[i].Last() > settled; i-- {
		n += c.log.tail[i].size()
	}
	return n
}

func (c *core) appendLocal(e Entries) {
	c.log.append(e)
	c.adoptConfigurations(e)
	// The own disk has confirmed nothing yet: commitIndex does not move here.
}

// heartbeat is the leader's ticker (§5.2). It keeps followers from
// campaigning, tells them the commit index, and gives up windows that nobody
// answers.
func (c *core) heartbeat() {
	if c.role != Leader {
		return
	}
	if c.checkQuorum(); c.role != Leader {
		return
	}
	if c.yield(); c.role != Leader {
		return
	}
	c.beatAt = c.now
	c.heartbeatLast, c.lastHeartbeat = c.lastHeartbeat, c.log.last
	for _, p := range c.progress {
		p.paused = false
		if len(p.inflight) > 0 && c.now.Sub(p.lastProgress) >= c.limits.electionTimeout {
			p.resend(c.appendSeq)
			c.out.hangups = append(c.out.hangups, p.id)
		}
		c.sendHeartbeat(p)
	}
}

// termDurable tells whether what a leader sends may leave. A cluster's only voter
// leads sooner: while its disk hangs, what it has for learners would pile up.
func (c *core) termDurable() bool { return c.hardLSN <= c.durableLSN }

func (c *core) sendHeartbeat(p *progress) {
	if !c.termDurable() {
		return
	}
	a := &appendArgs{
		Term: c.currentTerm, Leader: c.self, Prev: EntryID{p.match, p.matchTerm}, Commit: c.commitIndex, Heartbeat: true, round: c.reads.round,
	}
	c.askPromise(a)
	c.send(message{to: p.id, append: a})
	p.commitSent = max(p.commitSent, min(c.commitIndex, p.match)) // a follower commits no more than Prev
}

// sendAppends runs at the end of every transition of a leader, so that no rule
// has to remember that it made something sendable.
func (c *core) sendAppends() {
	for _, p := range c.progress {
		c.sendTo(p)
	}
}

// sendTo sends a follower whatever its window allows.
func (c *core) sendTo(p *progress) {
	if !c.termDurable() {
		return
	}
	for p.next <= c.log.last {
		if p.paused || p.held || p.reading || p.state == snapshotting || p.state == probing && len(p.inflight) > 0 {
			return
		}
		if p.next <= c.log.start.Index {
			p.next = c.log.start.Index + 1 // it may have more than we know of
		}
		if p.state == streaming && !p.mayStream(&c.limits, c.readyBytes(p.next), c.now) {
			return
		}
		entries, ok := c.log.from(p.next, c.log.last, c.limits.maxFrameBytes)
		if !ok {
			p.reading = true
			c.out.reads = append(c.out.reads, entryRequest{
				to: p.id, lo: p.next, hi: c.log.firstInMemory() - 1, maxBytes: c.limits.maxFrameBytes,
				term: c.currentTerm, truncations: c.log.truncations,
			})
			return
		}
		c.sendEntries(p, entries)
	}
	if p.state == streaming && len(p.inflight) == 0 && p.commitSent < min(p.wanted, c.commitIndex) {
		c.sendEntries(p, nil) // somebody waits there: commit is pushed at once
	}
}

// readyBytes returns how many bytes of entries from lo on wait in memory, as
// far as it matters for the window.
func (c *core) readyBytes(lo Index) (n int) {
	for i := len(c.log.tail) - 1; i >= 0 && n < c.limits.gatherBytes; i-- {
		e := c.log.tail[i]
		if e.first < lo {
			if e.Last() >= lo {
				n += e.slice(int(lo-e.first), e.Len()).size()
			}
			break
		}
		n += e.size()
	}
	return n
}

func (c *core) sendEntries(p *progress, entries []Entries) {
	prev := p.next - 1
	prevTerm, ok := c.log.term(prev)
	if !ok {
		panic(invariantError("append after entry %d, which is not in the log", prev))
	}
	c.appendSeq++
	a := &appendArgs{
		Term: c.currentTerm, Leader: c.self, Seq: c.appendSeq,
		Prev: EntryID{prev, prevTerm}, Commit: c.commitIndex, Entries: entries, round: c.reads.round,
	}
	p.sent(sentAppend{a.Seq, p.next, a.size(), c.now})
	p.next = a.lastIndex() + 1
	p.commitSent = max(p.commitSent, min(c.commitIndex, a.lastIndex()))
	c.send(message{to: p.id, append: a})
}

// entriesRead continues sending with entries that came from disk. They are
// dropped unless they are still this leader's and still what the follower needs.
func (c *core) entriesRead(q entryRequest, entries []Entries) {
	p := c.progressOf(q.to)
	if c.role != Leader || p == nil || q.term != c.currentTerm {
		return
	}
	p.reading = false
	if q.truncations == c.log.truncations && q.lo == p.next && len(entries) > 0 && q.lo > c.log.start.Index &&
		(p.state == streaming || p.state == probing && len(p.inflight) == 0) {
		c.sendEntries(p, entries)
	}
}

// onAppendRequest answers AppendEntries (Figure 2). The reply's match says
// what it acknowledges; it leaves when that is durable.
func (c *core) onAppendRequest(a *appendArgs, token any) {
	if c.role == Dead {
		return
	}
	r := &appendReply{}
	m := message{to: a.Leader, token: token, appendReply: r}
	if a.Term >= c.currentTerm {
		if c.role == Leader && a.Term == c.currentTerm {
			panic(invariantError("two leaders in term %d: %d and %d", a.Term, c.self, a.Leader))
		}
		c.follow(a.Term, a.Leader)
		r.Promised = c.promise(a)
		r.Success, r.NoRoom, r.Hint = c.acceptEntries(a)
		if r.Success && !a.Heartbeat {
			m.match = a.lastIndex()
		}
	}
	r.Term, r.Wanted, r.Full = c.currentTerm, c.wanted, c.full != nil
	c.send(m)
	if a.Campaign && r.Success && c.configuration.voter(c.self) && c.fit() {
		c.becomeCandidate(ReasonTransfer)
	}
}

// acceptEntries is steps 2 to 5 of AppendEntries' receiver: §5.3. Entries that
// the disk has no space for are refused before anything is staged of them.
func (c *core) acceptEntries(a *appendArgs) (success, noRoom bool, hint EntryID) {
	// What lies under our snapshot is committed, and so is what a leader has
	// there: it matches without being looked at.
	if a.Prev.Index >= c.log.start.Index && !c.log.matches(a.Prev) {
		return false, false, c.log.lastAtOrBelow(min(a.Prev.Index-1, c.log.last), a.Prev.Term)
	}
	if n := c.newBytes(a.Entries); n > 0 {
		c.lacksRoom = n > c.room && c.full != nil
		if n > c.room {
			return false, true, a.Prev
		}
	}
	for _, e := range a.Entries {
		c.mergeEntries(e)
	}
	// Only what this request has verified may be committed by it.
	if verified := min(a.Commit, a.lastIndex()); verified > c.commitIndex {
		c.commitIndex = verified
	}
	return true, false, EntryID{}
}

// newBytes is what these entries would add to the log on disk.
func (c *core) newBytes(runs []Entries) (n int64) {
	for _, e := range runs {
		if e.Last() > c.log.start.Index && !c.log.matches(EntryID{e.Last(), e.term(e.Len() - 1)}) {
			n += saveBytes(e)
		}
	}
	return n
}

// mergeEntries skips what the log has, truncates at the first conflict, and
// appends the rest. A request that is old or short removes nothing.
func (c *core) mergeEntries(e Entries) {
	i := 0
	for ; i < e.Len(); i++ {
		index := e.first + Index(i)
		if index <= c.log.start.Index || c.log.matches(EntryID{index, e.term(i)}) {
			continue
		}
		break
	}
	if i == e.Len() {
		return
	}
	if from := e.first + Index(i); from <= c.log.last {
		if from <= c.commitIndex {
			panic(invariantError("leader of term %d conflicts with committed entry %d", c.currentTerm, from))
		}
		c.emit(Event{Kind: EventTruncated, Index: from})
		c.truncateLog(from)
	}
	c.log.append(e.slice(i, e.Len()))
	c.adoptConfigurations(e.slice(i, e.Len()))
	c.sawTime(e)
}

// onAppendReply takes the answer to one append or heartbeat (Figure 2,
// "Leaders"). It counts only for the term that asked.
func (c *core) onAppendReply(from memberID, a *appendArgs, r *appendReply) {
	if c.role == Dead || c.stepDownFor(from, r.Term) {
		return
	}
	p := c.progressOf(from)
	if c.role != Leader || p == nil || a.Term != c.currentTerm || r.Term != c.currentTerm {
		return
	}
	if known := c.directoryOf(from); known == ([16]byte{}) {
		p.directory = r.directory
	} else if r.directory != known && r.directory != ([16]byte{}) {
		return // another disk under this name: what it has is not what was counted
	}
	p.lastContact = c.now
	p.round = max(p.round, a.round)
	if r.Promised {
		c.onPromise(p, a)
	}
	c.confirmReads()
	p.paused = false
	p.wanted = max(p.wanted, r.Wanted)
	p.noteSpace(r.Full)
	switch {
	case a.Heartbeat && r.Success:
	case a.Heartbeat:
		if a.Prev.Index == p.match && p.match > 0 { // otherwise it is an older heartbeat
			c.dataLost(p)
			p.probeFrom(c.log.last, c.appendSeq)
		}
	case r.Success:
		p.answered(a.Seq, c.now)
		if match := a.lastIndex(); match >= p.match {
			if match > p.match {
				p.matchSeq = c.appendSeq
			}
			t, ok := c.log.term(match)
			if ok {
				p.match, p.matchTerm = match, t
			}
			p.next = max(p.next, p.match+1)
			p.catchingUp = p.catchingUp && p.match < c.commitIndex
			switch {
			case p.state == probing && a.Seq >= p.epoch:
				p.state = streaming
			case p.state == snapshotting && p.match >= c.log.start.Index:
				p.state = probing // an answer that was on its way: it can do without
			}
			c.advanceCommit()
		}
	default:
		if !p.answered(a.Seq, c.now) {
			return
		}
		if r.NoRoom { // Prev matches; the entries are sent again when a heartbeat says that there is space
			p.probeFrom(a.Prev.Index+1, c.appendSeq)
			p.held = true
			return
		}
		if a.Prev.Index <= p.match && a.Seq > p.matchSeq {
			c.dataLost(p) // it was sent after the follower had acknowledged Prev
		}
		if a.Prev.Index > p.match && a.Prev.Index <= c.log.start.Index {
			c.sendSnapshot(p)
			return
		}
		agree := c.log.lastAtOrBelow(min(r.Hint.Index, a.Prev.Index-1), r.Hint.Term)
		p.probeFrom(agree.Index+1, c.appendSeq)
	}
}

// dataLost handles the refusal of a request whose Prev is an entry that the
// follower had acknowledged as durable in this term: it no longer has it, so
// its disk lies. What it has now is found out again.
func (c *core) dataLost(p *progress) {
	c.emit(Event{Kind: EventFollowerLostData, Peer: p.id.label(c), Index: p.match})
	p.match, p.matchTerm = 0, 0
}

// onAppendFailed is told that an append will never be answered: its
// connection broke. Everything sent on it is sent again, but not in a hurry.
func (c *core) onAppendFailed(to memberID, a *appendArgs) {
	p := c.progressOf(to)
	if c.role != Leader || p == nil || a.Heartbeat || a.Term != c.currentTerm || a.Seq < p.epoch {
		return
	}
	p.paused = true
	p.resend(c.appendSeq)
}

// onForward notes that somebody on a follower waits for entry i.
func (c *core) onForward(from memberID, i Index) {
	if p := c.progressOf(from); p != nil {
		p.wanted = max(p.wanted, i)
	}
}

// advanceCommit moves commitIndex to what a majority has durably, provided the
// entry there is of the current term: §5.4.2, Figure 8.
func (c *core) advanceCommit() {
	n, first := c.quorumMatch(), c.commitIndex < c.firstOfTerm
	if n <= c.commitIndex {
		return
	}
	if t, ok := c.log.term(n); !ok || t != c.currentTerm {
		return
	}
	c.commitIndex = n
	if first {
		c.yield() // who leads only because it was needed
	}
}

func (c *core) progressOf(id memberID) *progress {
	for _, p := range c.progress {
		if p.id == id {
			return p
		}
	}
	return nil
}
