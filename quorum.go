package raft

import (
	"slices"
	"time"
)

// quorum tells whether ids hold a majority of the voters (thesis 4.3).
func (conf *configuration) quorum(ids []memberID) bool {
	voters, n := 0, 0
	for _, m := range conf.members {
		if m.learner {
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
// durably. The leader counts as one of them, with what its own disk has
// confirmed and not with what it has appended.
func (c *core) quorumMatch() Index {
	m := c.matchesScratch[:0]
	if c.configuration.voter(c.self) {
		m = append(m, c.durableIndex)
	}
	for _, p := range c.progress {
		if !p.learner {
			m = append(m, p.match)
		}
	}
	c.matchesScratch = m
	if len(m) == 0 {
		return 0
	}
	slices.Sort(m)
	return m[(len(m)-1)/2] // half of them or fewer are below
}

// checkQuorum makes a leader give up once it has not heard from a majority for
// an election timeout (thesis 6.2): clients must not wait for a leader that
// can't commit. It looks again when that could next be the case.
func (c *core) checkQuorum() {
	heard := c.quorumContact()
	if c.limits.checkQuorum && c.now.Sub(heard) >= c.limits.electionTimeout {
		c.emit(Event{Kind: EventQuorumLost})
		c.becomeFollower(c.currentTerm, 0)
		return
	}
	if !c.limits.checkQuorum {
		heard = c.now
	}
	c.electionDeadline = heard.Add(c.limits.electionTimeout)
}

// quorumContact returns the latest time at or after which a majority of the
// voters, this server included, was heard from.
func (c *core) quorumContact() time.Time {
	t := c.contactsScratch[:0]
	if c.configuration.voter(c.self) {
		t = append(t, c.now)
	}
	for _, p := range c.progress {
		if !p.learner {
			t = append(t, p.lastContact)
		}
	}
	c.contactsScratch = t
	if len(t) == 0 {
		return time.Time{}
	}
	slices.SortFunc(t, time.Time.Compare)
	return t[(len(t)-1)/2]
}
