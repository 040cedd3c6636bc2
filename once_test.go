package raft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Exactly-once clients over real servers: what a session was answered stays its
// answer, whatever happens to nodes, connections and logs.

// onceClient is a session, used on a harness's nodes.
type onceClient struct {
	t  *testing.T
	h  *Harness
	id SessionID
}

func newOnceClient(t *testing.T, h *Harness, node int) *onceClient {
	t.Helper()
	id, err := h.Server(node).OpenSession(within(t, 10*time.Second))
	if err != nil || id == 0 {
		t.Fatalf("OpenSession: session %d, %v", id, err)
	}
	return &onceClient{t, h, id}
}

// ask proposes request seq, whose command is named after it, at a node.
func (c *onceClient) ask(node int, seq, below uint64) (Result, error) {
	return c.h.Server(node).ProposeOnce(within(c.t, 20*time.Second), RequestID{c.id, seq, below}, fmt.Append(nil, "request ", seq))
}

// must is ask that is answered.
func (c *onceClient) must(node int, seq uint64) Result {
	c.t.Helper()
	r, err := c.ask(node, seq, 0)
	if err != nil {
		c.t.Fatalf("request %d at node %d: %v", seq, node, err)
	}
	return r
}

func (c *onceClient) same(node int, seq uint64, want Result) {
	c.t.Helper()
	if got := c.must(node, seq); got.Index != want.Index || got.Term != want.Term || !bytes.Equal(got.Data, want.Data) {
		c.t.Errorf("request %d at node %d is answered %+v, before %+v", seq, node, got, want)
	}
}

// appliedOnce checks that no command was applied twice.
func appliedOnce(t *testing.T, h *Harness) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	at := map[string]Index{}
	for _, e := range h.applied {
		if i := at[string(e.Data)]; i != 0 {
			t.Errorf("%q was applied as entries %d and %d", e.Data, i, e.Index)
		}
		at[string(e.Data)] = e.Index
	}
}

// The original result, index and term on every node, after a failover, a
// restart and a snapshot that has replaced the log.
func TestOnceOriginalResult(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		c := newOnceClient(t, h, other(h, leader, 1))
		first := c.must(leader, 1)
		second := c.must(other(h, leader, 1), 2)
		if string(first.Data) != "1" || string(second.Data) != "2" {
			t.Fatalf("answers %q and %q", first.Data, second.Data)
		}
		for i := range 3 {
			c.same(i, 1, first)
			c.same(i, 2, second)
		}
		h.CrashPeer(leader)
		next, term := h.CheckSingleLeader()
		for _, i := range []int{other(h, leader, 1), other(h, leader, 2)} {
			c.same(i, 2, second)
		}
		if first.Term >= term {
			t.Errorf("the answer of term %d is no older than term %d", first.Term, term)
		}
		h.TakeSnapshot(next)
		h.RestartPeer(leader)
		c.same(leader, 1, first)
		h.CheckLinearizable()
		appliedOnce(t, h)
	})
}

// Status counts the sessions that are open, on every node alike.
func TestStatusSessions(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		last, behind := other(h, leader, 1), other(h, leader, 2)
		open := func(want int, nodes ...int) {
			t.Helper()
			for _, i := range nodes {
				waitApplied(t, h, i, h.Server(leader).Status().Applied)
				if st := h.Server(i).Status(); st.Sessions != want {
					t.Errorf("node %d has %d sessions, want %d", i, st.Sessions, want)
				}
			}
		}
		open(0, leader, last, behind)
		h.DisconnectPeer(behind)
		a, b := newOnceClient(t, h, leader), newOnceClient(t, h, last)
		a.must(last, 1)
		open(2, leader, last)
		proposeN(t, h, "x", 20)
		h.TakeSnapshot(leader)
		time.Sleep(5 * time.Second) // the log is not kept longer for a node that is away
		h.ReconnectPeer(behind)
		caughtUp(t, h, behind)
		open(2, behind) // by the snapshot of another node
		if n := journalOf(h, behind).restores.Load(); n != 1 {
			t.Fatalf("it restored %d snapshots", n)
		}
		h.CrashPeer(behind)
		h.RestartPeer(behind)
		if st := h.Server(behind).Status(); st.Sessions != 2 { // by its own, before it has heard from anybody
			t.Errorf("it starts with %d sessions", st.Sessions)
		}
		if err := h.Server(leader).CloseSession(within(t, 10*time.Second), b.id); err != nil {
			t.Fatal(err)
		}
		open(1, leader, last, behind)
		time.Sleep(2 * time.Minute)
		open(1, leader)           // it has expired, and no entry said so yet
		newOnceClient(t, h, last) // does
		open(1, leader, last, behind)
	}, configured(func(c *Config) { c.SessionTimeout, c.KeepLogBytes = time.Minute, 1 }))
}

// Sessions are part of snapshots: a node that has only a snapshot of them, its
// own or another node's, knows what was answered.
func TestOnceSnapshots(t *testing.T) {
	t.Run("own", func(t *testing.T) {
		snapshots(t, 1, func(t *testing.T, h *Harness) {
			c := newOnceClient(t, h, 0)
			want := c.must(0, 1)
			h.TakeSnapshot(0)
			before := h.Server(0).Status()
			h.CrashPeer(0)
			h.RestartPeer(0)
			if st := h.Server(0).Status(); st.Snapshot != before.Applied || st.Snapshot < want.Index {
				t.Fatalf("it starts with %+v", st)
			}
			c.same(0, 1, want)
			appliedOnce(t, h)
		})
	})
	t.Run("received", func(t *testing.T) {
		snapshots(t, 3, func(t *testing.T, h *Harness) {
			leader, _ := h.CheckSingleLeader()
			behind := other(h, leader, 1)
			h.DisconnectPeer(behind)
			c := newOnceClient(t, h, leader)
			want := c.must(leader, 1)
			proposeN(t, h, "a", 20)
			h.TakeSnapshot(leader)
			time.Sleep(5 * time.Second)
			h.ReconnectPeer(behind)
			caughtUp(t, h, behind)
			if n := journalOf(h, behind).restores.Load(); n != 1 {
				t.Fatalf("it restored %d snapshots", n)
			}
			h.Transfer(behind)
			c.same(behind, 1, want)
			c.same(leader, 1, want)
			h.CheckLinearizable()
			appliedOnce(t, h)
		})
	})
}

// A state machine on disk has the sessions in the transaction of what they did:
// a power cut that loses transactions loses both, and the log brings both back.
func TestOnceOnDisk(t *testing.T) {
	for _, lost := range []int{0, 1, 3} {
		onTables(t, 1, func(t *testing.T, h *Harness, tables []*table) {
			c := newOnceClient(t, h, 0)
			var want []Result
			for seq := uint64(1); seq <= 4; seq++ {
				want = append(want, c.must(0, seq))
			}
			lines := tableLines(h, 0)
			h.CrashPeer(0)
			tables[0].lose(lost)
			h.RestartPeer(0)
			for i, r := range want {
				c.same(0, uint64(i+1), r)
			}
			if got := tableLines(h, 0); got != lines {
				t.Errorf("with %d transactions lost it has %q, before %q", lost, got, lines)
			}
			appliedOnce(t, h)
		})
	}
	t.Run("snapshot", func(t *testing.T) {
		onTables(t, 3, func(t *testing.T, h *Harness, tables []*table) {
			leader, _ := h.CheckSingleLeader()
			behind := other(h, leader, 1)
			h.DisconnectPeer(behind)
			c := newOnceClient(t, h, leader)
			want := c.must(leader, 1)
			proposeN(t, h, "a", 20)
			h.TakeSnapshot(leader)
			time.Sleep(5 * time.Second)
			h.ReconnectPeer(behind)
			waitApplied(t, h, behind, h.Server(leader).Status().Applied)
			if tables[behind].restores != 1 {
				t.Fatalf("it restored %d snapshots", tables[behind].restores)
			}
			h.CrashPeer(behind)
			h.RestartPeer(behind)
			c.same(behind, 1, want)
			appliedOnce(t, h)
		})
	})
}

// A machine that stores nothing with its transactions is found out.
type forgetfulTable struct{ tableMachine }

func (m forgetfulTable) ApplyOnDisk(entries []Entry, results [][]byte, meta func() []MetaChange) error {
	return nil
}

func TestOnDiskForgetsMeta(t *testing.T) {
	virtual(t, 1, func(t *testing.T, h *Harness) {
		_, err := h.Server(0).Propose(within(t, time.Second), cmd(1))
		unknown(t, "meta was not stored", err, errMetaNotStored)
		h.CrashPeer(0)
	}, WithStateMachineOf(func(int) StateMachine { return forgetfulTable{tableMachine{&table{}}} }))
}

// batchJournal is a journal that takes entries in batches.
type batchJournal struct {
	journal
	batches [][]string
}

func (j *batchJournal) ApplyBatch(entries []Entry, results [][]byte) {
	var batch []string
	for i, e := range entries {
		results[i] = j.Apply(e)
		batch = append(batch, string(e.Data))
	}
	j.batches = append(j.batches, batch)
}

// A duplicate in one batch with the first is not given to the state machine,
// and answered with the first one's result.
func TestOnceBatch(t *testing.T) {
	virtual(t, 1, func(t *testing.T, h *Harness) {
		c := newOnceClient(t, h, 0)
		s := h.Server(0)
		h.SlowDisk(0, time.Second) // what comes meanwhile is committed together
		h.SubmitToServer(0, cmd(0))
		time.Sleep(10 * time.Millisecond)
		var ps []*Proposal
		for _, seq := range []uint64{1, 2, 1, 2, 1} {
			ps = append(ps, s.submit(entryOnce, RequestID{c.id, seq, 0}.encode(), cmd(int(seq)), nil, false))
		}
		ps = append(ps, s.Submit(cmd(3)))
		var got []string
		for _, p := range ps {
			r, err := p.Wait(within(t, 10*time.Second))
			got = append(got, fmt.Sprintf("%s %d %v", r.Data, r.Index-ps[0].result.Index, err))
		}
		if want := []string{"2 0 <nil>", "3 1 <nil>", "2 0 <nil>", "3 1 <nil>", "2 0 <nil>", "4 5 <nil>"}; !slices.Equal(got, want) {
			t.Errorf("answered %q, want %q", got, want)
		}
		batches := h.StateMachine(0).(*batchJournal).batches
		if last := batches[len(batches)-1]; !slices.Equal(last, []string{"command 1", "command 2", "command 3"}) {
			t.Errorf("the last batch was %q", last)
		}
		h.SlowDisk(0, 0)
	}, WithStateMachine(func() StateMachine { return &batchJournal{} }))
}

// Each kind of bad input has a typed error, on the leader and on a follower,
// and executes nothing.
func TestOnceRefusals(t *testing.T) {
	small := configured(func(c *Config) {
		c.SessionTimeout, c.MaxSessions, c.MaxSessionRequests, c.MaxResultBytes = time.Minute, 2, 4, 40
	})
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		for _, node := range []int{leader, other(h, leader, 1)} {
			c := newOnceClient(t, h, node)
			refused := func(what string, want SessionReason, err error) {
				t.Helper()
				var s *SessionError
				if !errors.As(err, &s) || s.Reason != want || errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, ErrSessionExpired) != s.over() {
					t.Errorf("%s: %v, want reason %d", what, err, want)
				}
			}
			ask := func(id SessionID, seq, below uint64) error {
				_, err := h.Server(node).ProposeOnce(within(t, time.Second), RequestID{id, seq, below}, fmt.Append(nil, "never ", node))
				return err
			}
			refused("unknown", SessionUnknown, ask(1<<40, 1, 1))
			refused("no session", SessionUnknown, ask(0, 1, 1))
			refused("number 0", SessionSequence, ask(c.id, 0, 0))
			refused("an answer to come", SessionSequence, ask(c.id, 1, 2))
			refused("too far", SessionWindow, ask(c.id, 4, 0))
			for seq := uint64(1); seq <= 5; seq++ {
				if _, err := h.Server(node).ProposeOnce(within(t, time.Second), RequestID{c.id, seq, seq}, fmt.Append(nil, node, " ", c.id, " ", seq)); err != nil {
					t.Errorf("request %d: %v", seq, err)
				}
			}
			refused("gone back", SessionSequence, ask(c.id, 4, 4))
			_, err := h.Server(node).ProposeOnce(within(t, time.Second), RequestID{c.id, 6, 6}, nil)
			rejected(t, "no command", err, ErrCommandSize)
			big := bytes.Repeat([]byte{byte(c.id)}, 41)
			for range 2 {
				r, err := h.Server(node).ProposeOnce(within(t, time.Second), RequestID{c.id, 6, 6}, big)
				var size *ResultSizeError
				if !errors.As(err, &size) || size.Size != 41 || size.Index != r.Index || r.Index == 0 || r.Data != nil {
					t.Errorf("a large result: %+v, %v", r, err)
				}
			}
			if err := h.Server(node).CloseSession(within(t, time.Second), c.id); err != nil {
				t.Error(err)
			}
			if err := h.Server(node).CloseSession(within(t, time.Second), c.id); err != nil {
				t.Errorf("closing it again: %v", err)
			}
			refused("closed", SessionClosed, ask(c.id, 7, 7))
			refused("closing an unknown one", SessionUnknown, h.Server(node).CloseSession(within(t, time.Second), 1<<40))
			idle := newOnceClient(t, h, node)
			idle.must(node, 1)
			time.Sleep(2 * time.Minute)
			refused("expired", SessionExpired, ask(idle.id, 2, 2))
			oldest := newOnceClient(t, h, node)
			newOnceClient(t, h, node)
			newOnceClient(t, h, node)
			refused("displaced", SessionDisplaced, ask(oldest.id, 1, 1))
		}
		for i := range 2 {
			h.CheckNotCommitted(fmt.Append(nil, "never ", i))
		}
		h.CheckLinearizable()
	}, small)
}

// A session lives as long as its client asks something, be it the same again.
func TestOnceKeepsAlive(t *testing.T) {
	virtual(t, 1, func(t *testing.T, h *Harness) {
		c := newOnceClient(t, h, 0)
		want := c.must(0, 1)
		for range 5 {
			time.Sleep(40 * time.Second)
			c.same(0, 1, want)
		}
	}, configured(func(c *Config) { c.SessionTimeout = time.Minute }))
}

// Bounds are in the log, so that nodes that are configured differently, and
// hold different ones of it in snapshots, agree about who is in a session.
func TestOnceConfigsDiffer(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		c := newOnceClient(t, h, 0) // a minute, two sessions
		want := c.must(1, 1)
		time.Sleep(50 * time.Second)
		for i := range 3 {
			c.same(i, 1, want)
		}
		b := newOnceClient(t, h, 1) // two minutes, three sessions
		time.Sleep(100 * time.Second)
		for i := range 3 {
			c.same(i, 1, want)
			if _, err := b.ask(i, 1, 1); err != nil {
				t.Error(err)
			}
		}
		h.CheckLinearizable()
	}, WithConfig(func(i int, c *Config) {
		c.SessionTimeout, c.MaxSessions, c.KeepLogBytes = time.Duration(i+1)*time.Minute, i+2, 1
	}))
}

// deafConn is a connection on which the answer to a forward never comes: the
// request has arrived then.
type deafConn struct {
	net.Conn
	armed *atomic.Int32 // how many answers are still to be lost
	deaf  atomic.Bool
}

func (c *deafConn) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte{'r', 'F', maxWireVersion, byte(frameRequest), byte(methodForward)}) && c.armed.Add(-1) >= 0 {
		c.deaf.Store(true)
	}
	return c.Conn.Write(p)
}

func (c *deafConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == nil && c.deaf.Load() {
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// losingAnswers makes nodes lose answers to forwards while armed is positive.
func losingAnswers(armed *atomic.Int32) HarnessOption {
	return configured(func(c *Config) {
		dial := c.DialContext
		c.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &deafConn{Conn: conn, armed: armed}, nil
		}
	})
}

// What was forwarded and perhaps appended is not sent again, unless it carries a
// RequestID: then it is, and takes effect once.
func TestForwardAnswerLost(t *testing.T) {
	var armed atomic.Int32
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		c := newOnceClient(t, h, follower)
		armed.Store(1)
		_, err := h.Server(follower).Propose(within(t, 20*time.Second), cmd(1))
		unknown(t, "without a RequestID", err, io.ErrUnexpectedEOF)
		armed.Store(3)
		r := c.must(follower, 1)
		if n := armed.Load(); n >= 0 {
			t.Errorf("%d answers were not lost", n)
		}
		c.same(leader, 1, r)
		time.Sleep(10 * time.Second)
		appliedOnce(t, h)
		h.CheckLinearizable()
	}, losingAnswers(&armed))
}

// An attempt that another leader's entry has superseded is made again.
func TestOnceSuperseded(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		c := newOnceClient(t, h, leader)
		h.DisconnectPeer(leader)
		answer := make(chan error)
		go func() {
			_, err := c.ask(leader, 1, 0)
			answer <- err
		}()
		next, _ := h.CheckSingleLeader()
		submit(t, h, next, 1)
		h.CheckCommitted(cmd(1))
		h.ReconnectPeer(leader)
		if err := <-answer; err != nil {
			t.Error(err)
		}
		appliedOnce(t, h)
		h.CheckLinearizable()
	})
}

// A rejection after an attempt whose outcome is unknown rejects nothing.
func TestOnceUnknownStays(t *testing.T) {
	var armed atomic.Int32
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		c := newOnceClient(t, h, follower)
		armed.Store(1)
		_, err := h.Server(follower).ProposeOnce(within(t, 10*time.Millisecond), RequestID{c.id, 1, 1}, cmd(1))
		unknown(t, "no time for another attempt", err, context.DeadlineExceeded)
		c.must(leader, 1)
		appliedOnce(t, h)
	}, losingAnswers(&armed))
}

// Clients write while leaders are lost, moved and cut off, on whichever node
// answers: each request takes effect once, and every wait ends with an answer.
func TestOnceThroughChaos(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		var wg sync.WaitGroup
		const clients, requests = 4, 25
		var answered atomic.Int32
		for k := range clients {
			c := newOnceClient(t, h, k%3)
			wg.Go(func() { answered.Add(int32(c.writeAll(k, requests))) })
		}
		for round := range 6 {
			time.Sleep(time.Second)
			leader, _, found := h.leader([]int{0, 1, 2})
			if !found {
				continue
			}
			switch round % 3 {
			case 0:
				h.DisconnectPeer(leader)
				time.Sleep(2 * time.Second)
				h.ReconnectPeer(leader)
			case 1:
				h.Transfer(other(h, leader, 1))
			case 2:
				h.Drop(0.2)
				time.Sleep(2 * time.Second)
				h.Drop(0)
			}
		}
		wg.Wait()
		if answered.Load() != clients*requests {
			t.Errorf("%d of %d requests were answered", answered.Load(), clients*requests)
		}
		h.CheckSingleLeader()
		appliedOnce(t, h)
		h.CheckLinearizable()
		h.CheckLogsMatch()
	})
}

// writeAll sends requests, three at once, each on one node after the other
// until it is answered, and counts the answers.
func (c *onceClient) writeAll(k, requests int) (answered int) {
	type answer struct {
		seq uint64
		r   Result
		err error
	}
	answers := make(chan answer, 3)
	seen := map[Index]bool{}
	send := func(seq, below uint64) {
		go func() {
			a := answer{seq: seq}
			for try := 0; try < 100; try++ {
				ctx, cancel := context.WithTimeout(c.t.Context(), 300*time.Millisecond)
				a.r, a.err = c.h.Server((k+try)%3).ProposeOnce(ctx, RequestID{c.id, seq, below}, fmt.Appendf(nil, "client %d request %d", k, seq))
				cancel()
				if !errors.Is(a.err, context.DeadlineExceeded) {
					break
				}
			}
			answers <- a
		}()
	}
	done := map[uint64]bool{}
	below, next := uint64(1), uint64(1)
	for range 3 {
		send(next, below)
		next++
	}
	for range requests {
		a := <-answers
		if want := fmt.Sprintf("client %d request %d", k, a.seq); a.err != nil || string(a.r.Data) != want || seen[a.r.Index] {
			c.t.Errorf("%s: %+v, %v", want, a.r, a.err)
		} else {
			answered++
		}
		seen[a.r.Index], done[a.seq] = true, true
		for done[below] {
			below++
		}
		if next <= uint64(requests) {
			send(next, below)
			next++
		}
	}
	return answered
}

// Every wait ends, and what it says is true, also where the node is closed or
// its state machine broken in the middle.
func TestOnceWaitEnds(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		node := other(h, leader, 1)
		c := newOnceClient(t, h, node)
		h.Partition([]int{node}, []int{leader, other(h, leader, 2)})
		ended := make(chan error, 2)
		for seq := uint64(1); seq <= 2; seq++ {
			go func() {
				_, err := c.h.Server(node).ProposeOnce(t.Context(), RequestID{c.id, seq, 0}, cmd(int(seq)))
				ended <- err
			}()
		}
		time.Sleep(time.Second)
		h.Server(node).Close()
		for range 2 {
			if err := <-ended; !errors.Is(err, ErrStopped) {
				t.Errorf("the node was closed: %v", err)
			}
		}
		if _, err := c.ask(node, 3, 0); !errors.Is(err, ErrStopped) || strings.Contains(err.Error(), "unknown") {
			t.Errorf("on a closed node: %v", err)
		}
		h.CrashPeer(node)
		h.Heal()
		c.must(leader, 1)
		appliedOnce(t, h)
	})
	t.Run("panic", func(t *testing.T) {
		virtual(t, 1, func(t *testing.T, h *Harness) {
			c := newOnceClient(t, h, 0)
			var apply *ApplyError
			if _, err := c.ask(0, 1, 0); !errors.As(err, &apply) || !errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("%v", err)
			}
			h.CrashPeer(0)
		}, WithStateMachine(func() StateMachine { return panicMachine{} }))
	})
}

type panicMachine struct{ echo }

func (panicMachine) Apply(Entry) []byte { panic("no") }
