package raft

import (
	"math/bits"
	"time"
)

// campaign counts the answers to one round of pre-votes or votes.
type campaign struct {
	preVote bool
	term    Term       // asked for
	granted []memberID // ascending arrival; self first
	behind  bool       // a voter has a better log
	why     Reason
}

// armElection draws a new deadline, so that split votes are rare (§5.2).
func (c *core) armElection() {
	timeout := c.drawTimeout()
	c.electionDeadline = c.now.Add(timeout)
	c.emit(Event{Kind: EventElectionTimer, Duration: timeout})
}

// armFirst is armElection for a server that starts. If it needs nobody else's
// vote there is no leader to wait for.
func (c *core) armFirst() {
	if !c.alone() {
		c.armElection()
		return
	}
	c.electionDeadline = c.now
	if c.hasPromisedAgainst(c.self) {
		c.electionDeadline = c.promisedUntil
	}
	c.emit(Event{Kind: EventElectionTimer, Duration: c.electionDeadline.Sub(c.now)})
}

// deferElection is armElection for a message from the leader: many a second,
// so it is not an event.
func (c *core) deferElection() {
	c.electionDeadline = c.now.Add(c.drawTimeout())
}

// drawTimeout draws from [T, 2T). Every member's dice are turned by a share of
// T of its own (multiples of the golden ratio lie far apart), so that members
// whose dice fall alike, clones of one machine say, do not split votes for ever.
func (c *core) drawTimeout() time.Duration {
	t := c.limits.electionTimeout
	turn, _ := bits.Mul64(uint64(c.self)*0x9E3779B97F4A7C15, uint64(t))
	return t + (time.Duration(c.rng.Int64N(int64(t)))+time.Duration(turn))%t
}

// tick is the election timer: a follower or candidate whose deadline has
// passed campaigns; a leader checks that it still has a quorum. (§5.2, thesis 6.2)
func (c *core) tick() {
	switch {
	case c.role == Dead || c.electionDeadline.IsZero() || c.now.Before(c.electionDeadline):
	case c.role == Leader:
		c.checkQuorum()
	default:
		c.forwardTo = 0 // it answers nothing either, most likely: proposals wait for who leads next
		c.startCampaign()
	}
}

// startCampaign asks for pre-votes first, unless they are switched off, so
// that a node which can't win does not disturb the others with its term. §9.6
// of the thesis.
func (c *core) startCampaign() {
	if !c.mayStand() || c.removed || !c.fit() && !c.needed() || c.hasPromisedAgainst(c.self) {
		c.armElection()
		return
	}
	if !c.limits.preVote {
		c.becomeCandidate(ReasonTimeout)
		return
	}
	if c.role == Candidate {
		c.role = Follower // the votes of this term are lost; ask again before raising it
		c.emit(Event{Kind: EventRole, Role: Follower, Reason: ReasonSplitVote})
	}
	why := ReasonTimeout
	if c.leaderGone {
		why = ReasonLeaderLeft
	}
	c.leader = 0
	c.ask(&campaign{preVote: true, term: c.currentTerm + 1, why: why}, false)
}

// becomeCandidate starts an election: §5.2. Its requests leave only when the
// own vote is durable.
func (c *core) becomeCandidate(why Reason) {
	c.role = Candidate
	c.leader = 0
	c.currentTerm++
	c.votedFor = c.self
	c.emit(Event{Kind: EventRole, Role: Candidate, Reason: why})
	c.ask(&campaign{term: c.currentTerm}, why == ReasonTransfer)
}

// ask sends the requests of a campaign to the voters. Learners are asked for
// votes too, though none is counted (quorum): so that they hear of the term. One
// that lags may be a voter by a newer configuration, and would otherwise fall a
// term behind, or run a term ahead, of candidates that do not know it.
func (c *core) ask(k *campaign, transfer bool) {
	k.granted = []memberID{c.self}
	c.campaign = k
	c.armElection()
	if k.preVote {
		c.emit(Event{Kind: EventPreVote})
	}
	for _, m := range c.configuration.members {
		if m.id != c.self && (!k.preVote || c.configuration.voter(m.id)) {
			c.send(message{to: m.id, vote: &voteArgs{
				Term: k.term, Candidate: c.self, Last: c.log.lastID(), PreVote: k.preVote, Transfer: transfer,
			}})
		}
	}
	c.countVotes()
}

func (c *core) countVotes() {
	k := c.campaign
	if !c.configuration.quorum(k.granted) {
		return
	}
	c.campaign = nil
	if k.preVote {
		c.becomeCandidate(k.why)
		return
	}
	c.emit(Event{Kind: EventElected, Votes: len(k.granted)})
	c.becomeLeader()
}

// onVoteRequest answers RequestVote (Figure 2) and its pre-vote form. It asks
// neither whether the candidate nor whether this server is a voter: our
// configuration may be older than theirs.
func (c *core) onVoteRequest(a *voteArgs, token any) {
	if c.role == Dead {
		return
	}
	granted, protected, behind := false, c.protectsLeader(a), !c.upToDate(a.Last)
	c.heldUp = c.heldUp || behind && !protected
	switch {
	case a.Term < c.currentTerm || protected:
	case a.PreVote:
		// Nothing changes here, not even the time of the last contact: a
		// granted pre-vote is an opinion, not a promise.
		granted = a.Term > c.currentTerm && !behind
	default:
		if a.Term > c.currentTerm {
			c.becomeFollower(a.Term, 0, ReasonHigherTerm, a.Candidate)
		}
		granted = (c.votedFor == 0 || c.votedFor == a.Candidate) && c.role == Follower && !behind
		if granted {
			c.votedFor = a.Candidate
			c.campaign, c.heldUp = nil, false
			c.armElection()
			c.emit(Event{Kind: EventVoted, Peer: a.Candidate.label(c)})
		}
	}
	c.send(message{to: a.Candidate, token: token, voteReply: &voteReply{
		Term: c.currentTerm, Granted: granted, Removed: c.wasRemoved(a.Candidate), Behind: behind,
	}})
}

// protectsLeader tells whether the request must be refused without looking at
// its term, because this server has a leader (thesis 4.2.3). It depends on
// check-quorum: without it a leader that nobody else hears could stay for ever.
func (c *core) protectsLeader(a *voteArgs) bool {
	if c.role == Leader && !c.configuration.has(a.Candidate) {
		return true // a server that is no member never deposes a leader
	}
	if a.Transfer {
		return false // its leader has given its lease up, too
	}
	if c.hasPromisedAgainst(a.Candidate) {
		return true
	}
	if !c.limits.checkQuorum {
		return false
	}
	if c.role == Leader {
		return true
	}
	return c.leader != 0 && c.leader != a.Candidate && !c.leaderGone && c.now.Sub(c.lastContact) < c.limits.electionTimeout
}

// upToDate: the log with the later last term, then the longer one (§5.4.1).
func (c *core) upToDate(other EntryID) bool {
	own := c.log.lastID()
	return other.Term > own.Term || other.Term == own.Term && other.Index >= own.Index
}

// onVoteReply counts a vote if it answers the campaign that is still on.
func (c *core) onVoteReply(from memberID, a *voteArgs, r *voteReply) {
	if c.role == Dead {
		return
	}
	if r.Behind {
		c.standBack(a)
	}
	if c.stepDownFor(from, r.Term) {
		return
	}
	if r.Removed && a.Candidate == c.self && !c.removed && c.configuration.has(from) {
		c.removed, c.campaign = true, nil
		c.emit(Event{Kind: EventRemoved, Peer: from.label(c)})
	}
	k := c.campaign
	if k == nil || a.PreVote != k.preVote || a.Term != k.term || !r.Granted || !c.configuration.voter(from) {
		return
	}
	for _, id := range k.granted {
		if id == from {
			return
		}
	}
	k.granted = append(k.granted, from)
	c.countVotes()
}

// standBack lets those campaign first that have a better log than this
// candidate, which a voter said exist. Without pre-votes it would otherwise
// raise its term in step with theirs: a candidate that is not known here as a
// voter, because this log lags, is not asked and so not told of the term, comes
// second in each, and finds this server's vote spent on itself.
func (c *core) standBack(a *voteArgs) {
	k := c.campaign
	if k != nil && !k.preVote && !a.PreVote && a.Term == k.term && !k.behind {
		k.behind = true
		c.electionDeadline = c.electionDeadline.Add(2 * c.limits.electionTimeout)
	}
}

// stepDownFor obeys a higher term in a reply (§5.1), if it is a member's.
func (c *core) stepDownFor(from memberID, term Term) bool {
	if term <= c.currentTerm || !c.configuration.has(from) {
		return false
	}
	c.becomeFollower(term, 0, ReasonHigherTerm, from)
	return true
}

// stepDown makes a candidate or leader a follower in its own term.
func (c *core) stepDown(why Reason) { c.becomeFollower(c.currentTerm, 0, why, 0) }

// becomeFollower adopts term, and leader if it is known (§5.1). Only a new
// term frees the vote. The reason, and whose message it was, are for the event.
func (c *core) becomeFollower(term Term, leader memberID, why Reason, from memberID) {
	if term < c.currentTerm {
		panic(invariantError("term %d back to %d", c.currentTerm, term))
	}
	newTerm := term > c.currentTerm
	if newTerm {
		c.currentTerm, c.votedFor = term, 0
	}
	if c.role != Follower || newTerm {
		c.emit(Event{Kind: EventRole, Role: Follower, Reason: why, Peer: from.label(c)})
	}
	if c.role == Leader {
		c.progress = nil
		c.armElection() // a leader's deadline was for its quorum
	}
	c.role = Follower
	c.campaign = nil
	if leader != c.leader {
		c.leader, c.forwardTo, c.leaderGone = leader, leader, false
		if leader != 0 {
			c.emit(Event{Kind: EventLeader, Peer: leader.label(c)})
		}
	}
}

// follow notes a message of the leader of term.
func (c *core) follow(term Term, leader memberID) {
	c.becomeFollower(term, leader, ReasonNewLeader, leader)
	c.lastContact, c.leaderGone, c.forwardTo, c.heldUp = c.now, false, leader, false
	c.deferElection()
}

// leaderLeft is told when the leader has closed every connection that it had
// made: its process is most likely dead, and waiting for the election timeout
// would only cost time. If only connections broke, the leader says so at once
// (reconnect). So this server waits for an eighth of the timeout, and then asks
// for pre-votes, which lead nowhere without a majority that has seen the same
// (protectsLeader). The voters ask one after the other, in the order of their
// numbers: all of them see it in the same moment, and would split their votes.
func (c *core) leaderLeft(leader memberID) {
	if c.role != Follower || leader == 0 || c.leader != leader || !c.limits.preVote || !c.limits.checkQuorum {
		return
	}
	c.leaderGone = true
	c.emit(Event{Kind: EventLeaderLeft, Peer: leader.label(c)})
	turn := 1
	for _, m := range c.configuration.members {
		if m.id < c.self && m.id != leader && c.configuration.voter(m.id) {
			turn++
		}
	}
	from := c.now
	if c.hasPromisedAgainst(c.self) {
		from = c.promisedUntil // and so have the others: about the same
	}
	if at := from.Add(time.Duration(turn) * c.limits.electionTimeout / 8); at.Before(c.electionDeadline) {
		c.electionDeadline = at
	}
}

// reconnect is told when a connection to another server broke.
func (c *core) reconnect(to memberID) {
	if c.role == Leader {
		if p := c.progressOf(to); p != nil {
			c.sendHeartbeat(p)
		}
	}
}

// becomeLeader: §5.2, and §8 for the no-op that lets entries of earlier terms
// be committed (§5.4.2).
func (c *core) becomeLeader() {
	c.role = Leader
	c.leader, c.forwardTo, c.heldUp = c.self, 0, false
	c.appendSeq, c.transfer, c.leaseGivenUp = 0, transfer{}, false
	c.progress, c.heartbeatLast, c.lastHeartbeat = nil, c.log.last+1, c.log.last+1
	c.trackMembers(c.log.last + 1)
	c.electionDeadline = c.now.Add(c.limits.electionTimeout)
	c.beatAt, c.graceUntil = c.now, time.Time{}
	c.emit(Event{Kind: EventRole, Role: Leader, Reason: ReasonElected})
	c.firstOfTerm = c.log.last + 1
	c.appendLocal(makeEntry(entryNoop, EntryID{c.firstOfTerm, c.currentTerm}, c.stamp(), nil))
}
