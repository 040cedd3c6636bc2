package raft

import "time"

// transfer is a leadership being handed over (thesis 3.10). While it is on the
// leader appends no proposals, so that the target can catch up; they wait in
// the queue, and go to the new leader or back to the old one.
type transfer struct {
	to       memberID
	deadline time.Time
	sent     bool
}

// transferLeadership begins to hand leadership to a voter, 0 for the one with
// the longest log.
func (c *core) transferLeadership(to memberID) error {
	switch {
	case c.role != Leader:
		return &TransferError{Reason: TransferNotLeader, Node: c.leader.label(c)}
	case c.transfer.to != 0:
		return &TransferError{Reason: TransferPending, Node: c.transfer.to.label(c)}
	case to == c.self:
		return nil
	case to == 0:
		if to = c.bestSuccessor(); to == 0 {
			return &TransferError{Reason: TransferNobody}
		}
	}
	m, p := c.configuration.find(to), c.progressOf(to)
	switch {
	case m == nil || p == nil || !m.votes(false) || c.configuration.joint && !m.votes(true):
		return &TransferError{Reason: TransferNotVoter, Node: to.label(c)}
	case c.now.Sub(p.lastContact) >= c.limits.electionTimeout:
		return &TransferError{Reason: TransferUnreachable, Node: to.label(c)}
	case p.full:
		return &TransferError{Reason: TransferDiskFull, Node: to.label(c)}
	}
	c.transfer = transfer{to: to, deadline: c.now.Add(c.limits.electionTimeout)}
	c.emit(Event{Kind: EventTransfer, Peer: to.label(c)})
	return nil
}

// bestSuccessor returns the reachable voter with space on its disk that needs
// the least, 0 if there is none. One that did not take over when it was asked to
// comes after those that were asked less often.
func (c *core) bestSuccessor() (best memberID) {
	var b *progress
	for _, p := range c.progress {
		m := c.configuration.find(p.id)
		switch {
		case p.full || !m.votes(false) || c.configuration.joint && !m.votes(true):
		case c.now.Sub(p.lastContact) >= c.limits.electionTimeout:
		case b == nil || p.declined < b.declined || p.declined == b.declined && p.match > b.match:
			best, b = p.id, p
		}
	}
	return best
}

// continueTransfer tells the target to campaign once it has everything, and
// gives up after an election timeout: then this leader goes on.
func (c *core) continueTransfer() {
	t := &c.transfer
	if t.to == 0 {
		return
	}
	p := c.progressOf(t.to)
	if p == nil || !c.now.Before(t.deadline) {
		if p != nil {
			p.declined++
		}
		c.transfer = transfer{}
		return
	}
	if !t.sent && p.match == c.log.last {
		t.sent = true
		c.sendCampaign(p)
	}
}

// sendCampaign tells a voter to hold an election at once (TimeoutNow). Those
// whom it asks for votes do not protect this leader, whatever they promised it.
// So its lease ends here, and it gets no other in this term, also if nothing
// comes of the election: the message may come much later.
func (c *core) sendCampaign(p *progress) {
	c.leaseGivenUp = true
	c.send(message{to: p.id, append: &appendArgs{
		Term: c.currentTerm, Leader: c.self, Prev: EntryID{p.match, p.matchTerm},
		Commit: min(c.commitIndex, p.match), Heartbeat: true, Campaign: true,
	}})
}
