package raft

import (
	"testing"
	"time"
)

// FuzzCore makes a few cores do what the input says, one event at a time:
// messages arrive, late, twice, in another order or never; timers fire, disks
// flush, nodes crash. After every event the properties of Figure 3 and those
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
	fuzzWait   // time passes for everybody
	fuzzEvents // how many there are
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
	case op == fuzzCampaign && n.core.role == Follower:
		fc.step(n, func(c *core) { c.becomeCandidate(ReasonTransfer) })
	}
}

// checkCommitted checks that what was committed by the last event is durable on
// a majority; nodes that are down count, because nobody can look.
func (fc *fuzzedCluster) checkCommitted() {
	for ; fc.checked < len(fc.committed); fc.checked++ {
		i, have := Index(fc.checked+1), 0
		for _, n := range fc.nodes {
			if n.core == nil {
				have++
			} else if t, _ := n.core.log.term(i); i <= n.core.durableIndex && t == fc.committed[fc.checked] {
				have++
			}
		}
		if have <= len(fc.nodes)/2 {
			fc.t.Fatalf("entry %d is committed and durable on %d nodes:\n%s", i, have, fc.table(fc.nodes))
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
