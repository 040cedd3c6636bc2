package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// readLeader returns a leader of n voters that has committed its no-op, unless
// early says that it has not.
func readLeader(t *testing.T, n int, early bool) *core {
	t.Helper()
	c := testCore(t, 1, n)
	sent := elect(t, c)
	if !early {
		for to := memberID(2); to <= memberID(n); to++ {
			for _, a := range appendsTo(to, sent) {
				ack(c, to, a)
			}
		}
		persist(t, c)
		if c.commitIndex < c.firstOfTerm {
			t.Fatalf("commit index is %d, want %d", c.commitIndex, c.firstOfTerm)
		}
	}
	return c
}

// stepReads ends a transition and returns the answers to reads and the requests
// that were sent.
func stepReads(c *core) (answers []readAnswer, sent []*appendArgs) {
	out := c.finish()
	for _, m := range out.msgs {
		if m.append != nil {
			sent = append(sent, m.append)
		}
	}
	return out.answers, sent
}

func confirm(c *core, from memberID, a *appendArgs) []readAnswer {
	c.onAppendReply(from, a, &appendReply{Term: c.currentTerm, Success: true})
	answers, _ := stepReads(c)
	return answers
}

// A leader answers a read once a majority has answered what was sent after the
// read came (thesis 6.4, steps 3 and 4).
func TestReadIsConfirmed(t *testing.T) {
	c := readLeader(t, 5, false)
	c.heartbeat()
	_, old := stepReads(c)
	c.readIndex(1, "r")
	answers, sent := stepReads(c)
	if len(answers) != 0 || len(sent) != 4 {
		t.Fatalf("%d answers and %d heartbeats, want 0 and 4", len(answers), len(sent))
	}
	for from := memberID(2); from <= 5; from++ { // they were sent before the read
		if got := confirm(c, from, old[from-2]); len(got) != 0 {
			t.Fatalf("the answer of %d to an older heartbeat confirmed a read", from)
		}
	}
	if got := confirm(c, 2, sent[0]); len(got) != 0 {
		t.Fatal("two of five confirmed a read")
	}
	if got := confirm(c, 2, sent[0]); len(got) != 0 {
		t.Fatal("one member was counted twice")
	}
	confirm(c, 2, old[0]) // answers on two connections: the older one is late, and takes nothing back
	got := confirm(c, 3, sent[1])
	if len(got) != 1 || !got[0].ok || got[0].index != c.commitIndex || got[0].token != "r" {
		t.Fatalf("answers are %+v, want index %d", got, c.commitIndex)
	}
}

// A new leader may not know what its predecessor has committed, so it answers
// only after its own no-op is committed (§8; etcd-io/etcd 7331).
func TestReadWaitsForTheNoOp(t *testing.T) {
	c := readLeader(t, 3, true)
	c.readIndex(1, "r")
	answers, _ := stepReads(c)
	c.heartbeat()
	more, sent := stepReads(c)
	for _, a := range sent {
		more = append(more, confirm(c, 2, a)...)
	}
	if len(answers)+len(more) != 0 {
		t.Fatal("a read was answered before the leader had committed anything in its term")
	}
	c.onAppendReply(2, &appendArgs{Term: c.currentTerm, Leader: 1, Seq: c.progressOf(2).inflight[0].seq, Prev: EntryID{c.log.last, c.currentTerm}}, &appendReply{Term: c.currentTerm, Success: true})
	answers, sent = stepReads(c)
	if c.commitIndex != c.firstOfTerm || len(answers) != 0 || len(sent) == 0 {
		t.Fatalf("commit %d, answers %v, sent %d", c.commitIndex, answers, len(sent))
	}
	var got []readAnswer
	for _, a := range sent {
		if a.Heartbeat && len(got) == 0 {
			got = confirm(c, 2, a)
		}
	}
	if len(got) != 1 || got[0].index != c.firstOfTerm {
		t.Fatalf("answers are %+v, want index %d", got, c.firstOfTerm)
	}
}

// Reads that come during a round share the next one; the index is that of its
// beginning.
func TestReadsShareARound(t *testing.T) {
	c := readLeader(t, 3, false)
	c.readIndex(1, 0)
	_, first := stepReads(c)
	for i := 1; i <= 100; i++ {
		c.readIndex(1, i)
		if _, sent := stepReads(c); len(sent) != 0 {
			t.Fatal("a read began a round while another was under way")
		}
	}
	c.onAppendReply(2, first[0], &appendReply{Term: c.currentTerm, Success: true})
	answers, second := stepReads(c)
	if len(answers) != 1 || len(second) != 2 {
		t.Fatalf("%d answers, %d heartbeats, want 1 and 2", len(answers), len(second))
	}
	if got := confirm(c, 3, first[1]); len(got) != 0 {
		t.Fatal("the first round's answer confirmed the second round")
	}
	if got := confirm(c, 3, second[1]); len(got) != 100 {
		t.Fatalf("%d answers, want 100", len(got))
	}
}

// Whoever stops leading refuses the reads that wait.
func TestReadsEndWithTheLeadership(t *testing.T) {
	for name, end := range map[string]func(c *core){
		"higher term":   func(c *core) { c.onAppendRequest(&appendArgs{Term: c.currentTerm + 1, Leader: 2}, nil) },
		"lost quorum":   func(c *core) { c.now = c.now.Add(time.Hour); c.beatAt = c.now; c.heartbeat() },
		"never led":     func(c *core) {},
		"the node dies": func(c *core) { c.die(errors.New("disk")) },
	} {
		c := testCore(t, 1, 3)
		if name != "never led" {
			c = readLeader(t, 3, false)
			c.readIndex(1, 1)
			stepReads(c)
		}
		c.readIndex(1, 2)
		end(c)
		answers, _ := stepReads(c)
		for _, a := range answers {
			if a.ok {
				t.Errorf("%s: a read was answered with %d", name, a.index)
			}
		}
		if want := map[bool]int{true: 1, false: 2}[name == "never led"]; len(answers) != want {
			t.Errorf("%s: %d answers, want %d", name, len(answers), want)
		}
	}
}

// A follower that reads is told the commit index as soon as it has the entries,
// not with the next heartbeat.
func TestReadPushesCommit(t *testing.T) {
	c := readLeader(t, 3, false)
	sent := proposeOne(t, c, "x")
	ack(c, 3, appendsTo(3, sent)[0])
	persist(t, c) // committed by the leader and 3; the disk of 2 is slow
	c.readIndex(2, "r")
	_, round := stepReads(c)
	if got := confirm(c, 3, round[1]); len(got) != 1 || got[0].index != c.log.last {
		t.Fatalf("answers are %+v, want index %d", got, c.log.last)
	}
	ack(c, 2, appendsTo(2, sent)[0])
	pushed := appendsTo(2, persist(t, c))
	if len(pushed) != 1 || pushed[0].Commit != c.log.last || len(pushed[0].Entries) != 0 {
		t.Fatalf("sent %+v, want the commit index", pushed)
	}
}

// A single voter confirms itself; learners confirm nothing.
func TestReadAmongLearners(t *testing.T) {
	c := readLeader(t, 1, false)
	c.readIndex(1, "alone")
	if answers, _ := stepReads(c); len(answers) != 1 || !answers[0].ok {
		t.Fatalf("answers are %+v", answers)
	}
	c = readLeader(t, 3, false)
	conf := c.configuration
	conf.members = append([]member(nil), conf.members...)
	conf.members[2].learner = true
	conf.members = append(conf.members, member{id: 4, name: "d"})
	c.configs[0].conf = conf
	c.configuration = conf
	c.trackMembers(c.log.last + 1)
	c.readIndex(1, "r")
	_, sent := stepReads(c)
	if len(sent) == 0 {
		t.Fatal("no heartbeat was sent")
	}
	probe := &appendArgs{Term: c.currentTerm, Leader: 1, Heartbeat: true, round: c.reads.round}
	if got := confirm(c, 3, probe); len(got) != 0 {
		t.Fatal("a learner confirmed a read")
	}
	if got := confirm(c, 4, probe); len(got) != 1 {
		t.Fatalf("%d answers, want 1", len(got))
	}
}

// With two configurations both majorities must confirm (thesis 4.3).
func TestReadInJointConfiguration(t *testing.T) {
	c := readLeader(t, 3, false)
	conf := c.configuration
	conf.members = append([]member(nil), conf.members...)
	conf.members[1].next, conf.members[2].next = leaves, leaves
	for id := memberID(4); id <= 5; id++ {
		conf.members = append(conf.members, member{id: id, name: NodeID(fmt.Sprint(id)), learner: true, next: becomesVoter})
	}
	conf.joint = true
	c.configs[0].conf = conf
	c.configuration = conf
	c.trackMembers(c.log.last + 1)
	c.readIndex(1, "r")
	stepReads(c)
	probe := &appendArgs{Term: c.currentTerm, Leader: 1, Heartbeat: true, round: c.reads.round}
	if got := confirm(c, 2, probe); len(got) != 0 {
		t.Fatal("the old majority alone confirmed a read")
	}
	if got := confirm(c, 4, probe); len(got) != 1 {
		t.Fatalf("%d answers, want 1", len(got))
	}
}

// Every node reads what any node has acknowledged, and an idle follower is told
// at once that it may: nobody waits for a heartbeat.
func TestReadYourClustersWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3, WithStateMachine(func() StateMachine { return &journal{} }),
			WithConfig(func(_ int, c *Config) { c.HeartbeatInterval, c.ElectionTimeout = time.Minute, time.Hour }))
		defer h.Shutdown()
		h.patience, h.poll = 24*time.Hour, time.Second
		leader, _ := h.CheckSingleLeader()
		for k := range 10 {
			if k == 5 { // its acknowledgements come later than its reads
				h.SlowDisk((leader+1)%3, 100*time.Millisecond)
			}
			for reader := range 3 {
				writer := (reader + k) % 3
				cmd := fmt.Sprintf("%d-%d", k, reader)
				if _, err := h.Server(writer).Propose(t.Context(), []byte(cmd)); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				if _, err := h.Server(reader).ReadIndex(t.Context()); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took > time.Second {
					t.Errorf("a read on node %d (leader %d) took %v", reader, leader, took)
				}
				lines := readJournal(h, reader)
				if len(lines) < len(cmd) || lines[len(lines)-len(cmd):] != cmd {
					t.Fatalf("node %d read %q without %q", reader, lines, cmd)
				}
			}
		}
	})
}

// A leader that is cut off does not know of its successor's writes, so it
// answers no read; when it is back, it asks the new leader.
func TestReadOnDeposedLeader(t *testing.T) {
	for _, checkQuorum := range []bool{true, false} {
		snapshots(t, 3, func(t *testing.T, h *Harness) {
			old, _ := h.CheckSingleLeader()
			h.DisconnectPeer(old)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			early := make(chan error, 1)
			go func() {
				_, err := h.Server(old).ReadIndex(ctx) // while it still leads
				early <- err
			}()
			proposeN(t, h, "new", 3)
			if err := <-early; !errors.Is(err, ErrNoLeader) || !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("ReadIndex of a leader that is cut off: %v", err)
			}
			h.ReconnectPeer(old)
			if _, err := h.Server(old).ReadIndex(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := readJournal(h, old); got != "new0 new1 new2" {
				t.Fatalf("it read %q", got)
			}
		}, WithConfig(func(_ int, c *Config) { c.DisableCheckQuorum, c.DisablePreVote = !checkQuorum, !checkQuorum }))
	}
}

// Many reads at once, on every node, while leaders come and go: each ends, and
// none goes back behind an acknowledged write.
func TestReadsDuringElections(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		var wg sync.WaitGroup
		var mu sync.Mutex
		acknowledged := Index(0)
		for k := range 10 {
			leader, _ := h.CheckSingleLeader()
			r, err := h.Server(leader).Propose(t.Context(), fmt.Append(nil, k))
			if err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			acknowledged = max(acknowledged, r.Index)
			mu.Unlock()
			for i := range 3 {
				for range 10 {
					wg.Go(func() {
						mu.Lock()
						want := acknowledged
						mu.Unlock()
						got, err := h.Server(i).ReadIndex(t.Context())
						if err != nil || got < want {
							t.Errorf("node %d: ReadIndex returned %d, %v; entry %d was acknowledged before", i, got, err, want)
						}
					})
				}
			}
			h.DisconnectPeer(leader)
			h.CheckSingleLeader()
			h.ReconnectPeer(leader)
		}
		wg.Wait()
	})
}

// Reads that wait share a round, on the leader and on a follower: many readers
// cost as much as one.
func TestReadersShareRounds(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		for i := range 3 {
			s := h.Server(i)
			time.Sleep(time.Second)
			synctest.Wait()
			before := readRound(h.Server(leader))
			var wg sync.WaitGroup
			s.cm.mu.Lock() // no step takes a read meanwhile, and joining a round needs no lock
			for range 100 {
				wg.Go(func() {
					if _, err := s.ReadIndex(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
			s.cm.unlock()
			wg.Wait()
			if n := readRound(h.Server(leader)) - before; n != 1 {
				t.Errorf("100 reads at once on node %d (leader %d) took %d rounds", i, leader, n)
			}
		}
	})
}

// A read that begins after a step has taken those before it belongs to the next round.
func TestReadIsNotInARoundThatHasBegun(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		cm := h.Server(leader).cm
		cm.mu.Lock()
		first, _ := cm.reads.join(false)
		cm.transition(func(*core) {})
		second, isFirst := cm.reads.join(false)
		cm.unlock()
		if first == second || !isFirst {
			t.Fatal("a read joined a round that had begun")
		}
		<-first.done
		<-second.done
		if !first.ok || !second.ok || second.index < first.index {
			t.Errorf("answers: %+v and %+v", first.appliedWait, second.appliedWait)
		}
	})
}

// A read ends with the node, and with its context where there is no leader.
func TestReadEnds(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := (leader + 1) % 3
		h.Partition([]int{0}, []int{1}, []int{2})
		for _, i := range []int{leader, follower} {
			ended := make(chan error, 1)
			s := h.Server(i)
			go func() {
				_, err := s.ReadIndex(context.Background())
				ended <- err
			}()
			time.Sleep(10 * time.Second)
			h.CrashPeer(i)
			if err := <-ended; !errors.Is(err, ErrStopped) {
				t.Errorf("ReadIndex of a node that was stopped: %v", err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := h.Server((leader + 2) % 3).ReadIndex(ctx); !errors.Is(err, ErrNoLeader) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("ReadIndex without a leader: %v", err)
		}
	})
}
