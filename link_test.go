package raft

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/memnet"
)

// memNetwork returns the network under a harness in memory.
func memNetwork(h *Harness) *memnet.Network { return h.net.(*memNet).net }

// A greeting that gets lost must not keep a leader's heartbeats from a follower
// for longer than an election or two.
func TestLostGreeting(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		from, to := harnessHost(leader), harnessHost(follower)
		swallowed := 0
		memNetwork(h).SetFilter(from, to, func(p []byte) memnet.Verdict {
			swallowed++
			return memnet.Drop
		})
		memNetwork(h).Break(from, to)
		time.Sleep(100 * time.Millisecond)
		memNetwork(h).SetFilter(from, to, nil)
		if swallowed == 0 {
			t.Fatal("nothing was sent while everything sent was lost")
		}
		time.Sleep(time.Second)
		holds(t, h, time.Second, "the follower hears its leader", func() bool {
			return h.Server(follower).Status().Leader == h.Server(leader).conf.ID
		})
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
	})
}

// A connection that went silent is given up and dialled anew, once: what it did
// not answer does not end the new one.
func TestSilentConnectionIsRedialledOnce(t *testing.T) {
	var dials [3][3]atomic.Int64 // from, to
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		time.Sleep(linkIdleTimeout + 5*time.Second) // only heartbeats' connections are left
		before := dials[leader][follower].Load()
		from, to := harnessHost(leader), harnessHost(follower)
		swallowed := 0
		memNetwork(h).SetFilter(from, to, func([]byte) memnet.Verdict {
			swallowed++
			return memnet.Drop
		})
		time.Sleep(500 * time.Millisecond)
		memNetwork(h).SetFilter(from, to, nil) // new connections are whole
		if swallowed < 2 {
			t.Fatalf("%d heartbeats were lost; the test has no force", swallowed)
		}
		time.Sleep(10 * time.Second)
		if n := dials[leader][follower].Load() - before; n != 1 {
			t.Errorf("the leader dialled %d times, want once", n)
		}
		submit(t, h, leader, 2)
		committedOn(h, 3, 2)
		if l, again := h.CheckSingleLeader(); l != leader || again != term {
			t.Errorf("leader %d of term %d, before %d of %d", l, again, leader, term)
		}
	}, WithConfig(func(i int, c *Config) {
		c.ElectionTimeout = time.Second
		dial := c.DialContext
		c.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			for j := range dials[i] {
				if addr == harnessAddr(j) {
					dials[i][j].Add(1)
				}
			}
			return dial(ctx, network, addr)
		}
	}))
}

// A connection that ended while nothing was under way costs no proposal its
// answer: it is dialled anew before anything is sent.
func TestForwardAfterConnectionEnded(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		for i := range 20 {
			if _, err := h.Server(follower).Propose(within(t, time.Second), cmd(i)); err != nil {
				t.Fatalf("proposal %d: %v", i, err)
			}
			memNetwork(h).Break(harnessHost(leader), harnessHost(follower))
			time.Sleep(time.Millisecond)
		}
	})
}

// A founder that hears of the decision from another one acts on it at once,
// however rare heartbeats are. (All of it in virtual time.)
func TestFormingDoesNotWaitForHeartbeats(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
	}, WithConfig(func(i int, c *Config) {
		c.HeartbeatInterval = 10 * time.Minute
		if i == 2 {
			time.Sleep(time.Second) // the others have asked in vain, and wait
		}
	}))
}

// A leader that hangs with a proposal it was forwarded: the follower has nothing
// more to send it, and still the proposal's wait ends.
func TestForwardToHungLeader(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		if _, err := h.Server(follower).Propose(t.Context(), cmd(0)); err != nil { // the link is up
			t.Fatal(err)
		}
		h.Pause(leader)
		p := h.Server(follower).Submit(cmd(1))
		began := time.Now()
		_, err := p.Wait(within(t, time.Minute))
		if !errors.Is(err, ErrOutcomeUnknown) || time.Since(began) > time.Second {
			t.Errorf("after %v: %v; want an unknown outcome within a second", time.Since(began), err)
		}
	})
}

// A step that hangs a connection up sends what it sends there on the next one:
// nothing of it is lost, so nothing waits for the next heartbeat.
func TestHangupLosesNothing(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		submit(t, h, leader, 0)
		committedOn(h, 3, 0)
		cm := h.Server(leader).cm
		for i := range 50 {
			if err := cm.queue.add(entryCommand, nil, cmd(i+1), &Proposal{done: make(chan struct{})}, false); err != nil { // the step takes it
				t.Fatal(err)
			}
			cm.step(func(c *core) {
				id := c.configuration.byName(h.Server(follower).conf.ID).id
				c.out.hangups = append(c.out.hangups, id)
			})
			synctest.Wait()
			cm.mu.Lock()
			last := cm.core.log.last
			cm.mu.Unlock()
			f := h.Server(follower).cm
			f.mu.Lock()
			got := f.core.log.last
			f.mu.Unlock()
			if got != last {
				t.Fatalf("round %d: the follower's log ends at %d, the leader's at %d", i, got, last)
			}
		}
	})
}

// A candidate asks for votes also where an attempt to connect was in vain a moment
// ago: the node may be back since, and the next election is a timeout away.
func TestVotesAreAskedForAfterARefusal(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			h := NewHarness(t, 3, WithSeed(seed))
			defer h.Shutdown()
			leader, term := h.CheckSingleLeader()
			i := (leader + 1) % 3
			h.DisconnectPeer(i)
			time.Sleep(2 * time.Second) // so long that connections were given up
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			since := time.Now()
			for e := range h.Server(i).Events(ctx) {
				if e.Kind == EventPreVote && e.Time.After(since) {
					break
				}
			}
			synctest.Wait() // it has tried to connect
			h.ReconnectPeer(i)
			if !h.eventually(func() bool { return h.Server(i).Status().Leader != "" }) {
				t.Fatal("it has found no leader")
			}
			synctest.Wait() // and the leader has its answer
			h.Transfer(i)
			if now, next := h.CheckSingleLeader(); now != i || next != term+1 {
				t.Errorf("seed %d: node %d leads term %d, want %d in term %d", seed, now, next, i, term+1)
			}
		})
	}
}

// withSlowHeartbeats makes heartbeats rarer than idle connections are closed.
var withSlowHeartbeats = configured(func(c *Config) {
	c.HeartbeatInterval, c.ElectionTimeout = 2*linkIdleTimeout, 10*linkIdleTimeout
})

// hasSeenLeaderLeave tells whether node i has taken its leader for gone.
func hasSeenLeaderLeave(h *Harness, i int) bool {
	for e := range h.Server(i).Events(expired()) {
		if e.Kind == EventLeaderLeft {
			return true
		}
	}
	return false
}

// A leader has left when neither of its connections is there any more,
// whichever ends last.
func TestLeaderLeavesWithItsLastConnection(t *testing.T) {
	for _, order := range [][]channel{{channelControl, channelAppend}, {channelAppend, channelControl}} {
		virtual(t, 3, func(t *testing.T, h *Harness) {
			leader, _ := h.CheckSingleLeader()
			follower := other(h, leader, 1)
			submit(t, h, leader, 1)
			synctest.Wait() // its connections are so young that it does not connect again at once
			s := h.Server(leader)
			for k, ch := range order {
				s.cm.mu.Lock()
				id := s.cm.core.configuration.byName(h.Server(follower).conf.ID).id
				l := s.links[linkKey{id, ch}]
				s.cm.mu.Unlock()
				l.hangup()
				synctest.Wait()
				if left := hasSeenLeaderLeave(h, follower); left != (k == 1) {
					t.Errorf("after %v were closed the leader is taken for gone: %v", order[:k+1], left)
				}
			}
		}, withSlowHeartbeats)
	}
}

// A leader keeps its connections from one heartbeat to the next, or it would be
// taken for gone. If they break it connects again at once.
func TestIdleLeaderStays(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		time.Sleep(11 * linkIdleTimeout) // between two heartbeats
		if hasSeenLeaderLeave(h, follower) {
			t.Error("an idle leader is taken for gone")
		}
		if now, t2 := h.CheckSingleLeader(); now != leader || t2 != term {
			t.Errorf("node %d leads term %d, want %d in term %d", now, t2, leader, term)
		}
		broken := time.Now()
		memNetwork(h).Break(harnessHost(leader), harnessHost(follower))
		time.Sleep(time.Second)
		cm := h.Server(follower).cm
		cm.mu.Lock()
		defer cm.mu.Unlock()
		if cm.core.lastContact.Before(broken) {
			t.Errorf("a second after its connections broke, the leader was heard from %v ago", time.Since(cm.core.lastContact))
		}
	}, withSlowHeartbeats)
}
