package raft

import (
	"testing"
	"testing/synctest"
	"time"
)

// beat sends a leader's heartbeats for d, answered by everybody but the disk.
func beat(t *testing.T, c *core, d time.Duration) (campaigns []memberID) {
	t.Helper()
	var box outbox
	for end := c.now.Add(d); c.now.Before(end) && c.role == Leader; {
		c.now = c.now.Add(c.limits.heartbeatInterval)
		c.heartbeat()
		out := c.finish()
		if err := c.checkState(); err != nil {
			t.Fatal(err)
		}
		box.add(out.msgs)
		for _, m := range box.release(nil, c.durableLSN, c.currentTerm, c.hardLSN) {
			switch {
			case m.append == nil || !m.append.Heartbeat:
			case m.append.Campaign:
				campaigns = append(campaigns, m.to)
			case c.role == Leader:
				c.onAppendReply(m.to, m.append, &appendReply{Term: c.currentTerm, Success: true})
			}
		}
	}
	return campaigns
}

// A leader whose disk hangs tells the best of the others to campaign, and steps
// down; it stands again when its disk does.
func TestStuckDiskGivesLeadershipUp(t *testing.T) {
	c := readLeader(t, 3, false)
	if got := beat(t, c, time.Hour); len(got) != 0 || c.role != Leader {
		t.Fatalf("an idle leader told %v to campaign and is %v", got, c.role)
	}
	var b entryBuilder
	b.add(entryCommand, []byte("x"))
	c.propose(&b) // the disk does not confirm it
	if got := beat(t, c, (diskPatience-1)*c.limits.electionTimeout); len(got) != 0 || c.role != Leader {
		t.Fatalf("it told %v to campaign after %d election timeouts, and is %v", got, diskPatience-1, c.role)
	}
	if got := beat(t, c, 2*c.limits.electionTimeout); len(got) != 1 || c.role != Follower {
		t.Fatalf("it told %v to campaign, and is %v", got, c.role)
	}
	term := c.currentTerm
	for range 5 {
		c.now = c.electionDeadline
		c.tick()
		c.finish()
	}
	if c.currentTerm != term || c.campaign != nil {
		t.Fatalf("it campaigns with a disk that hangs: term %d, was %d", c.currentTerm, term)
	}
	c.onAppendRequest(&appendArgs{Term: term, Leader: 2, Prev: EntryID{c.log.start.Index, c.log.start.Term}, Heartbeat: true, Campaign: true}, nil)
	if c.finish(); c.role != Follower {
		t.Fatalf("it takes the leadership over with a disk that hangs: %v", c.role)
	}
	c.persisted(c.lsn, time.Minute)
	c.now = c.electionDeadline
	if c.tick(); c.role != Candidate {
		t.Fatalf("with its disk back it is %v and does not campaign", c.role)
	}
}

// Where nobody else could lead, a leader that is stuck goes on.
func TestStuckLeaderWithoutSuccessor(t *testing.T) {
	c := readLeader(t, 1, false)
	var b entryBuilder
	b.add(entryCommand, []byte("x"))
	c.propose(&b)
	if got := beat(t, c, time.Hour); len(got) != 0 || c.role != Leader {
		t.Fatalf("it told %v to campaign, and is %v", got, c.role)
	}
}

// A leader's disk hangs under load: others take over, writes go on, and when
// the disk is back the node catches up (hashicorp/raft 503, 666).
func TestHungDiskMovesLeadership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		old, _ := h.CheckSingleLeader()
		h.SlowDisk(old, time.Minute)
		h.SubmitToServer(old, []byte("hangs"))
		time.Sleep(3 * time.Second) // the bound is 1.5 s
		leader, _ := h.CheckSingleLeader()
		if leader == old {
			t.Fatal("a node whose disk hangs leads")
		}
		for k := range 3 {
			if _, err := h.Server(leader).Propose(t.Context(), []byte{byte(k)}); err != nil {
				t.Fatal(err)
			}
		}
		h.SlowDisk(old, 0) // for later writes
		time.Sleep(2 * time.Minute)
		h.CheckCommittedN([]byte("hangs"), 3)
		h.Transfer(old)
		h.CheckLogsMatch()
	})
}

// A leader whose state machine hangs hands over as well.
func TestHungApplyMovesLeadership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		machines := make([]*blocker, 3)
		h := NewHarness(t, 3, WithStateMachineOf(func(i int) StateMachine {
			machines[i] = &blocker{entered: make(chan Index, 100), release: make(chan struct{})}
			close(machines[i].release)
			return machines[i]
		}))
		defer h.Shutdown()
		old, _ := h.CheckSingleLeader()
		h.Read(old, func(StateMachine) []byte { machines[old].release = release; return nil })
		s := h.Server(old).Submit([]byte("hangs"))
		time.Sleep(5 * time.Second) // the bound is 3 s
		if leader, _ := h.CheckSingleLeader(); leader == old {
			t.Fatal("a node whose state machine hangs leads")
		}
		close(release)
		if _, err := s.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.Transfer(old)
	})
}
