package raft

import (
	"slices"
	"testing"
	"time"
)

// FuzzCore makes a few cores do what the input says, one event at a time:
// messages arrive, late, twice, in another order or never; timers fire, disks
// flush, nodes crash, take snapshots, become learners and voters again. After every event the properties of Figure 3 and those
// of invariants.go are checked. Nothing else decides anything, so an input
// always gives the same run. With the highest bit of the first byte the faults
// end at last, and a leader must be elected and bring everybody up to date.
func FuzzCore(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 2 || len(b) > 1000 {
			return
		}
		fc := newFuzzedCluster(t, b[0], b[1])
		for b = b[2:]; len(b) >= 2; b = b[2:] {
			fc.event(b[0], b[1])
			fc.checkCommitted()
		}
		if fc.heals {
			fc.heal()
		}
	})
}

type fuzzedCluster struct {
	*testCluster
	heals   bool
	checked int // entries committed before
}

// newFuzzedCluster takes the sizes and options of a cluster from two bytes.
func newFuzzedCluster(t *testing.T, sizes, slow byte) *fuzzedCluster {
	names := []string{"a", "b", "c", "d", "e"}[:1+int(sizes&7)%5]
	fc := &fuzzedCluster{testCluster: newTestCluster(t, names...), heals: sizes&0x80 != 0}
	fc.quiet = !testing.Verbose() // go test -run FuzzCore/NAME -v tells what happens
	for i, n := range fc.nodes {
		n.slow = slow>>i&1 == 1
		n.limits.checkQuorum = sizes>>3&1 == 0
		n.limits.preVote = n.limits.checkQuorum && sizes>>4&1 == 0
		if sizes>>5&1 == 1 {
			n.limits.maxFrameBytes = 1
		}
		n.core.limits = n.limits
	}
	return fc
}

// The events that an input can ask for.
const (
	fuzzDeliver   = iota // the message at a place of the network
	fuzzInOrder          // the oldest message between two nodes
	fuzzEverybody        // everything, in order
	fuzzDuplicate        // a message arrives, and will again
	fuzzDrop             // a message is lost
	fuzzTimeout          // a node's election timer fires, late perhaps
	fuzzHeartbeat        // a leader's ticker
	fuzzPropose
	fuzzFlush // a slow disk is done
	fuzzCrash // what was not flushed is lost
	fuzzBoot
	fuzzCut   // a way from one node to another loses everything from now on
	fuzzMend  // all ways are open again
	fuzzBreak // an append connection
	fuzzCampaign
	fuzzWait     // time passes for everybody
	fuzzSnapshot // a node takes one, and its log goes
	fuzzMembers  // a leader makes learners of one or two voters, voters of learners
	fuzzEvents   // how many there are
)

// event performs one event: op says which, arg with whom. What makes no sense
// now is left out.
func (fc *fuzzedCluster) event(op, arg byte) {
	n := fc.nodes[int(arg)%len(fc.nodes)]
	peer := fc.nodes[int(arg>>4)%len(fc.nodes)]
	at := 0
	if len(fc.net) > 0 {
		at = int(arg) % len(fc.net)
	}
	switch op %= fuzzEvents; {
	case op <= fuzzDrop:
		fc.network(op, n, peer, at)
	case op == fuzzBoot && n.core == nil:
		fc.boot(n)
	case op == fuzzMend:
		fc.cuts = nil
	case op == fuzzCut && n != peer:
		fc.cut(n.id, peer.id)
	case op == fuzzWait:
		fc.now = fc.now.Add(time.Duration(arg) * n.limits.heartbeatInterval / 16)
	case n.core == nil:
	case op == fuzzTimeout:
		fc.timeout(n)
	case op == fuzzHeartbeat:
		fc.step(n, (*core).heartbeat)
	case op == fuzzPropose && n.core.role == Leader:
		fc.propose(n, "x")
	case op == fuzzFlush:
		fc.flush(n)
	case op == fuzzCrash:
		fc.crash(n)
	case op == fuzzBreak && n != peer:
		fc.breakConnection(n.id, peer.id)
	case op == fuzzSnapshot:
		fc.takeSnapshot(n)
	case op == fuzzMembers:
		if l := fc.leader(); l != nil {
			fc.change(l, n, peer)
		}
	case op == fuzzCampaign && n.core.role == Follower && n.core.configuration.voter(n.id):
		fc.step(n, func(c *core) { c.becomeCandidate(ReasonTransfer) })
	}
}

// change makes learners of voters and voters of learners.
func (fc *fuzzedCluster) change(leader *testNode, members ...*testNode) {
	fc.step(leader, func(c *core) {
		_, _ = c.changeMembers(func(list []Member) ([]Member, error) { // it may be refused
			for i := range list {
				if slices.ContainsFunc(members, func(n *testNode) bool { return string(list[i].ID) == n.name }) {
					list[i].Learner = !list[i].Learner
				}
			}
			return list, nil
		})
	})
}

// decides tells whether the nodes for which yes holds are a majority of the
// voters as they are, and, if conf is joint, of those as they will be.
func (fc *fuzzedCluster) decides(conf *configuration, yes func(n *testNode) bool) bool {
	var voters, have [2]int
	for _, m := range conf.members {
		votes := [2]bool{!m.learner, m.next == becomesVoter || m.next == staysAsIs && !m.learner}
		for i := range votes {
			if votes[i] {
				if voters[i]++; yes(fc.nodes[m.id-1]) {
					have[i]++
				}
			}
		}
	}
	return 2*have[0] > voters[0] && (!conf.joint || 2*have[1] > voters[1])
}

// checkCommitted checks that what was committed by the last event is durable on
// a quorum, by a configuration that somebody uses who knows of it; nodes that are
// down count, because nobody can look.
func (fc *fuzzedCluster) checkCommitted() {
	for ; fc.checked < len(fc.committed); fc.checked++ {
		i := Index(fc.checked + 1)
		has := func(n *testNode) bool {
			if n.core == nil || i <= n.core.log.start.Index {
				return true
			}
			t, _ := n.core.log.term(i)
			return i <= n.core.durableIndex && t == fc.committed[fc.checked]
		}
		if !slices.ContainsFunc(fc.nodes, func(n *testNode) bool {
			return n.core != nil && n.core.commitIndex >= i && slices.ContainsFunc(n.core.configs, func(e configEntry) bool { return fc.decides(&e.conf, has) })
		}) {
			fc.t.Fatalf("entry %d is committed and not durable on a quorum:\n%s", i, fc.table(fc.nodes))
		}
	}
}

// network performs the events that are about a message under way.
func (fc *fuzzedCluster) network(op byte, from, to *testNode, at int) {
	if len(fc.net) == 0 {
		return
	}
	switch m := fc.net[at]; op {
	case fuzzDeliver:
		fc.deliver(fc.take(m))
	case fuzzInOrder:
		if ms := fc.between(from.id, to.id); len(ms) > 0 {
			fc.deliver(fc.take(ms[0]))
		}
	case fuzzEverybody:
		fc.settle()
	case fuzzDuplicate:
		fc.deliver(m)
	case fuzzDrop:
		fc.take(m)
	}
}

// heal ends all faults and checks that the cluster works.
func (fc *fuzzedCluster) heal() {
	fc.cuts, fc.net = nil, nil
	for _, n := range fc.nodes {
		n.slow = false
		if n.core == nil {
			fc.boot(n)
		}
		if n.core.lsn > n.core.durableLSN {
			fc.flush(n)
		}
	}
	for _, n := range fc.nodes { // their connections are new: what was under way will not be answered
		for _, peer := range fc.nodes {
			fc.breakConnection(n.id, peer.id)
		}
	}
	fc.run(10 * fc.nodes[0].limits.electionTimeout)
	leader := fc.leader()
	if leader == nil {
		fc.t.Fatalf("nobody leads ten election timeouts after all faults ended:\n%s", fc.table(fc.nodes))
	}
	fc.propose(leader, "last")
	fc.run(time.Second)
	for _, n := range fc.nodes {
		if n.core.commitIndex != leader.core.log.last || n.core.log.last != leader.core.log.last {
			fc.t.Fatalf("not all have and commit entry %d:\n%s", leader.core.log.last, fc.table(fc.nodes))
		}
	}
}
