package raft

import (
	"slices"
	"time"
)

// quorum tells whether ids hold a majority of the voters, of both
// configurations while there are two (§6, thesis 4.3).
func (conf *configuration) quorum(ids []memberID) bool {
	return conf.majority(ids, false) && (!conf.joint || conf.majority(ids, true))
}

func (conf *configuration) majority(ids []memberID, entered bool) bool {
	voters, n := 0, 0
	for i := range conf.members {
		m := &conf.members[i]
		if !m.votes(entered) {
			continue
		}
		voters++
		if slices.Contains(ids, m.id) {
			n++
		}
	}
	return voters > 0 && n > voters/2
}

// quorumMatch returns the highest index that a majority of the voters has
// durably, of both configurations while there are two.
func (c *core) quorumMatch() Index {
	m := c.majorityMatch(false)
	if c.configuration.joint {
		m = min(m, c.majorityMatch(true))
	}
	return m
}

// majorityMatch is quorumMatch for one configuration. The leader counts as one
// of its voters, with what its own disk has confirmed and not with what it has
// appended.
func (c *core) majorityMatch(entered bool) Index {
	s := c.matchesScratch[:0]
	for i := range c.configuration.members {
		m := &c.configuration.members[i]
		if !m.votes(entered) {
			continue
		}
		if m.id == c.self {
			s = append(s, c.durableIndex)
		} else {
			s = append(s, c.progressOf(m.id).match)
		}
	}
	c.matchesScratch = s
	if len(s) == 0 {
		return 0
	}
	slices.Sort(s)
	return s[(len(s)-1)/2] // half of them or fewer are below
}

// checkQuorum makes a leader give up once it has not heard from a majority for
// an election timeout (thesis 6.2): clients must not wait for a leader that
// can't commit. It looks again when that could next be the case.
//
// A leader that was itself not running, because its process was stopped or the
// machine slept, finds answers that it has not read yet. It shows in heartbeats
// that were not sent. It takes the time of one heartbeat to read them, once
// until it hears a majority again.
func (c *core) checkQuorum() {
	heard := c.quorumContact()
	if !c.limits.checkQuorum {
		heard = c.now
	}
	c.electionDeadline = heard.Add(c.limits.electionTimeout)
	if c.now.Before(c.electionDeadline) {
		c.graceUntil = time.Time{}
		return
	}
	if c.graceUntil.IsZero() && c.now.Sub(c.beatAt) > 2*c.limits.heartbeatInterval {
		c.graceUntil = c.now.Add(c.limits.heartbeatInterval)
	}
	if c.now.Before(c.graceUntil) {
		c.electionDeadline = c.graceUntil
		return
	}
	c.emit(Event{Kind: EventQuorumLost})
	c.stepDown(ReasonNoQuorum)
}

// quorumContact returns the latest time at or after which a majority of the
// voters, this server included, was heard from; of both configurations while
// there are two.
func (c *core) quorumContact() time.Time {
	t := c.majorityContact(false)
	if c.configuration.joint {
		if entered := c.majorityContact(true); entered.Before(t) {
			t = entered
		}
	}
	return t
}

func (c *core) majorityContact(entered bool) time.Time {
	s := c.contactsScratch[:0]
	for i := range c.configuration.members {
		m := &c.configuration.members[i]
		if !m.votes(entered) {
			continue
		}
		if m.id == c.self {
			s = append(s, c.now)
		} else {
			s = append(s, c.progressOf(m.id).lastContact)
		}
	}
	c.contactsScratch = s
	if len(s) == 0 {
		return time.Time{}
	}
	slices.SortFunc(s, time.Time.Compare)
	return s[(len(s)-1)/2]
}
