package raft

import (
	"testing"
	"time"
)

// quietSim is a cluster without faults: small delays, quick disks, clients at
// work. Tests add the one fault that they are about.
func quietSim(seed uint64, nodes int, l limits) *sim {
	s := newSim(seed, simPlan{})
	t := l.electionTimeout
	s.swarm = simSwarm{
		nodes: nodes, voters: nodes, timeout: t, ordered: true,
		delayMin: t / 200, delayMean: t / 200, flushMean: t / 200, applyMean: t / 200, readMean: t / 200,
		clientEvery: t / 20, batchMax: 4, dataMax: 50, keys: 4, lagMax: 1 << 40,
		// one round, without anything that strikes during it
		rounds: 1, roundTimeouts: 1000, nemesisEvery: 1 << 50, nemeses: []int{nemHealNet},
	}
	s.conf, s.nodes, s.book, s.load = configuration{}, nil, ledger{}, simClients{}
	s.build()
	for _, n := range s.nodes {
		n.limits = l
	}
	return s
}

func quietLimits() limits {
	return limits{
		electionTimeout: 100 * time.Millisecond, heartbeatInterval: 20 * time.Millisecond, preVote: true, checkQuorum: true,
		gatherBytes: 64, maxFrameBytes: 1024, maxInflight: 8, maxInflightBytes: 4096, maxTailBytes: 4096, maxUncommittedSize: 65536,
	}
}

// runFor lets d of virtual time pass.
func (s *sim) runFor(d time.Duration) {
	for end := s.now + d; len(s.heap) > 0 && s.heap[0].at <= end; {
		e := s.pop()
		s.now = e.at
		s.handle(e)
	}
}

// failing turns a broken invariant into a test failure.
func (s *sim) failing(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if r := recover(); r != nil {
			t.Fatalf("seed %d: %v\n%s", s.seed, r, s.lastEvents(60))
		}
	}()
	f()
}

// TestSimQuiet: without faults one election is all that happens. Nobody
// campaigns again, no append is refused and no connection is hung up.
func TestSimQuiet(t *testing.T) {
	t.Parallel()
	for seed := uint64(1); seed <= uint64(seedCount(3)); seed++ {
		s := quietSim(seed, 5, quietLimits())
		s.failing(t, func() {
			s.start()
			s.runFor(5 * time.Second)
			elections := s.book.elections
			refused := s.refused
			s.runFor(20 * time.Second)
			if s.book.elections != elections || s.refused != refused || s.hangups != 0 {
				t.Errorf("seed %d: without faults %d elections, %d refused appends, %d connections hung up", seed, s.book.elections-elections, s.refused-refused, s.hangups)
			}
			if len(s.book.committed) < 500 || s.load.answered < 500 {
				t.Errorf("seed %d: %d entries committed, %d answered", seed, len(s.book.committed), s.load.answered)
			}
		})
	}
}

// cut breaks the path from one node to another for good.
func (s *sim) cut(pairs ...[2]int) {
	for _, p := range pairs {
		s.link(p[0], p[1]).cut = true
	}
}

// progressUnder runs a cluster under a lasting partial partition. Entries must
// go on being committed, and the leadership must not go round.
func progressUnder(t *testing.T, nodes int, l limits, maxElections int, cut func(s *sim, leader int)) {
	t.Helper()
	for seed := uint64(1); seed <= uint64(seedCount(3)); seed++ {
		s := quietSim(seed, nodes, l)
		s.failing(t, func() {
			s.start()
			s.runFor(10 * l.electionTimeout)
			leader := s.highestLeader()
			if leader == nil {
				t.Fatalf("seed %d: no leader", seed)
			}
			cut(s, leader.i)
			s.runFor(10 * l.electionTimeout)
			elections := s.book.elections
			for range 20 {
				before := len(s.book.committed)
				s.runFor(5 * l.electionTimeout)
				if len(s.book.committed) == before {
					t.Errorf("seed %d: nothing was committed for five election timeouts: %s", seed, s.describe())
					return
				}
			}
			if n := s.book.elections - elections; n > maxElections {
				t.Errorf("seed %d: %d elections in a hundred timeouts", seed, n)
			}
		})
	}
}

// A and B do not see each other, both see C. Whoever leads stays.
func TestSimChain(t *testing.T) {
	progressUnder(t, 3, quietLimits(), 0, func(s *sim, leader int) {
		other := (leader + 1) % 3
		s.cut([2]int{leader, other}, [2]int{other, leader})
	})
}

// The leader loses its quorum, but every other node still sees one node that
// sees all: the "quorum loss" topology. That node must take over.
func TestSimQuorumLoss(t *testing.T) {
	progressUnder(t, 5, quietLimits(), 2, func(s *sim, leader int) {
		hub := (leader + 1) % 5
		for a := range 5 {
			for b := range 5 {
				if a != b && a != hub && b != hub {
					s.cut([2]int{a, b})
				}
			}
		}
	})
}

// A leader that can send but hears nothing must give up: its heartbeats would
// keep the others from campaigning for ever.
func TestSimDeafLeader(t *testing.T) {
	progressUnder(t, 3, quietLimits(), 1, func(s *sim, leader int) {
		for i := range 3 {
			if i != leader {
				s.cut([2]int{i, leader})
			}
		}
	})
}

// A node that can send but hears nothing must not disturb the others.
func TestSimDeafFollower(t *testing.T) {
	progressUnder(t, 3, quietLimits(), 0, func(s *sim, leader int) {
		deaf := (leader + 1) % 3
		for i := range 3 {
			if i != deaf {
				s.cut([2]int{i, deaf})
			}
		}
	})
}
