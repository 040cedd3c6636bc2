package raft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/raft/internal/vfs"
)

// named is a state machine that answers with its own name, so that a test can
// tell whose Apply a result is from.
type named struct {
	noSnapshots
	name string
	got  [][]byte
}

func (n *named) Apply(e Entry) []byte {
	n.got = append(n.got, e.Data)
	return fmt.Appendf(nil, "%s applied %s", n.name, e.Data)
}

// namedMachines makes machines "0", "1", ... in the order of the nodes' first starts.
func namedMachines() HarnessOption {
	next := 0
	return WithStateMachine(func() StateMachine {
		next++
		return &named{name: fmt.Sprint(next - 1)}
	})
}

// Any node takes proposals. Whoever proposed gets the result of its own node's
// Apply, and can read its write there.
func TestProposeAnywhere(t *testing.T) {
	anywhere := func(t *testing.T, h *Harness) {
		_, term := h.CheckSingleLeader()
		var last Index
		for i := range h.n {
			command := cmd(i)
			r, err := h.Server(i).Propose(t.Context(), command)
			clear(command) // it was copied
			if err != nil {
				t.Fatalf("propose on node %d: %v", i, err)
			}
			if want := fmt.Sprintf("%d applied command %d", i, i); string(r.Data) != want || r.Term < term || r.Index <= last {
				t.Errorf("node %d: result %q at %d in term %d, want %q after %d in term %d", i, r.Data, r.Index, r.Term, want, last, term)
			}
			last = r.Index
			h.Read(i, func(m StateMachine) []byte {
				if got := m.(*named).got; !bytes.Equal(got[len(got)-1], cmd(i)) {
					t.Errorf("node %d acknowledged command %d and shows %q", i, i, got[len(got)-1])
				}
				return nil
			})
		}
	}
	t.Run("virtual", func(t *testing.T) { virtual(t, 3, anywhere, namedMachines()) })
	t.Run("tcp", func(t *testing.T) { overTCP(t, 3, anywhere, namedMachines(), unhurried) })
}

// within returns a context that ends after d and with the test.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func rejected(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("%s: %v, want the rejection %v", what, err, want)
	}
}

func unknown(t *testing.T, what string, err, cause error) {
	t.Helper()
	if !errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, cause) {
		t.Errorf("%s: %v, want an unknown outcome because of: %v", what, err, cause)
	}
}

// A context that ends before anybody took the proposal is a rejection, and
// it stays one; after that the outcome is unknown.
func TestProposeContextEnds(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := h.Server(leader).Propose(ended, cmd(0))
		rejected(t, "a context that had ended", err, context.Canceled)

		for i := range h.n {
			h.DisconnectPeer(i)
		}
		_, err = h.Server(leader).Propose(within(t, 50*time.Millisecond), cmd(1))
		unknown(t, "appended by a leader without quorum", err, context.DeadlineExceeded)
		must(t, h, "the leader steps down", func() bool { return h.Server(leader).Status().Role != Leader })
		for i := range h.n {
			must(t, h, "nobody knows a leader", func() bool { return h.Server(i).Status().Leader == "" })
			_, err = h.Server(i).Propose(within(t, time.Second), cmd(10+i))
			rejected(t, "no leader", err, ErrNoLeader)
			rejected(t, "no leader", err, context.DeadlineExceeded)
		}
		h.Heal()
		leader, _ = h.CheckSingleLeader()
		submit(t, h, leader, 2)
		committedOn(h, 3, 2)
		time.Sleep(time.Second)
		for _, i := range []int{0, 10, 11, 12} {
			h.CheckNotCommitted(cmd(i))
		}
	})
}

// ErrNoLeader says what the node knew of a leader, which often there is one.
func TestNoLeaderSaysWhy(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		says := func(what string, err error, want string) {
			t.Helper()
			rejected(t, what, err, ErrNoLeader)
			rejected(t, what, err, context.DeadlineExceeded)
			if !strings.Contains(err.Error(), "it had no effect, try again: "+want) {
				t.Errorf("%s: %v; want %q", what, err, want)
			}
		}
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		ended, cancel := context.WithDeadline(t.Context(), time.Now())
		defer cancel()
		_, err := h.Server(leader).Propose(ended, cmd(0))
		says("a context that had ended", err, "the context had ended before: ")
		h.Partition([]int{0}, []int{1}, []int{2})
		for err = nil; !errors.Is(err, ErrNoLeader); { // until it has taken as much as it may
			h.Server(leader).Submit(make([]byte, 4<<10))
			_, err = h.Server(leader).Propose(within(t, time.Millisecond), cmd(1))
		}
		says("a leader without a majority", err, "this node leads, and was busy or waits for a majority")
		_, err = h.Server(leader).ReadIndex(within(t, time.Millisecond))
		says("a read there", err, "this node leads, and was busy or waits for a majority")
		_, err = h.Server(follower).ReadIndex(within(t, time.Millisecond))
		says("a read at its follower", err, fmt.Sprintf("node %q leads, and was busy or can't be reached: ", fmt.Sprint(leader)))
		must(t, h, "nobody knows a leader", func() bool { return h.Server(follower).Status().Leader == "" })
		_, err = h.Server(follower).Propose(within(t, time.Millisecond), cmd(2))
		says("without a leader", err, "this node knows of none; a majority")
		added := h.startNew()
		_, err = h.Server(added).Propose(within(t, time.Second), cmd(3))
		says("a node that nobody has added", err, "the cluster is not formed yet, or this node not added to it: ")
	}, smallLimits)
}

// A proposal made while there is no leader waits for one.
func TestProposeWaitsForLeader(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower, third := other(h, leader, 1), other(h, leader, 2)
		h.CrashPeer(leader)
		h.CrashPeer(third)
		must(t, h, "the loss is noticed", func() bool { return h.Server(follower).Status().Leader == "" })
		p := h.Server(follower).Submit(cmd(1))
		time.Sleep(time.Second)
		h.RestartPeer(third)
		if _, err := p.Wait(within(t, 5*time.Second)); err != nil {
			t.Error(err)
		}
		committedOn(h, 2, 1)
	})
}

// What was forwarded may have been appended when the connection hangs or breaks:
// the outcome is unknown, and the proposal is not sent a second time.
func TestForwardOutcomeUnknown(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		if _, err := h.Server(follower).Propose(t.Context(), cmd(0)); err != nil { // the link is up
			t.Fatal(err)
		}
		h.DisconnectPeer(leader)
		_, err := h.Server(follower).Propose(within(t, 10*time.Millisecond), cmd(1))
		unknown(t, "forwarded into a dead network", err, context.DeadlineExceeded)
		p := h.Server(follower).Submit(cmd(2))
		second, _ := h.CheckSingleLeader()
		_, err = p.Wait(within(t, 5*time.Second))
		if err != nil && !errors.Is(err, ErrOutcomeUnknown) && !errors.Is(err, ErrSuperseded) {
			t.Errorf("forwarded to a leader that was lost: %v", err)
		}
		h.ReconnectPeer(leader)
		submit(t, h, second, 3)
		committedOn(h, 3, 3)
		time.Sleep(time.Second)
		applied := map[string]int{}
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, e := range h.applied {
			if applied[string(e.Data)]++; applied[string(e.Data)] > 1 {
				t.Errorf("%q was applied twice", e.Data)
			}
		}
	})
}

func TestProposeSize(t *testing.T) {
	const limit = 1000
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		last := h.Server(leader).Status().Last
		for _, i := range []int{leader, other(h, leader, 1)} {
			s := h.Server(i)
			_, err := s.Propose(t.Context(), nil)
			rejected(t, "an empty command", err, ErrCommandSize)
			_, err = s.Propose(t.Context(), make([]byte, limit+1))
			rejected(t, "one byte too much", err, ErrCommandSize)
			if got := h.Server(leader).Status().Last; got != last {
				t.Errorf("a rejected command was stored: the log ends at %d, before at %d", got, last)
			}
			if _, err := s.Propose(t.Context(), make([]byte, limit)); err != nil {
				t.Errorf("a command of the largest size: %v", err)
			}
			last++
		}
	}, configured(func(c *Config) { c.MaxCommandBytes = limit }))
}

func TestProposeOverloaded(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		for i := range h.n {
			h.DisconnectPeer(i)
		}
		must(t, h, "the leader steps down", func() bool { return h.Server(leader).Status().Role != Leader })
		var queued []*Proposal
		var err error
		for i := 0; err == nil && i < 1000; i++ {
			p := h.Server(leader).Submit(bytes.Repeat([]byte{'x'}, 100))
			if isClosed(p.done) {
				_, err = p.Wait(t.Context())
			} else {
				queued = append(queued, p)
			}
		}
		rejected(t, "a full queue", err, ErrOverloaded)
		if n := len(queued); n < 50 || n > 100 {
			t.Errorf("%d commands of 100 bytes were queued in 10000", n)
		}
		h.Heal()
		for _, p := range queued {
			if _, err := p.Wait(within(t, 10*time.Second)); err != nil {
				t.Errorf("a queued proposal: %v", err)
			}
		}
	}, configured(func(c *Config) { c.MaxQueueBytes, c.MaxCommandBytes = 10000, 1000 }))
}

// A leader that can't commit takes MaxUncommittedBytes and the queue that
// crosses the limit, and no more; the rest waits or is refused.
func TestProposeUncommittedIsBounded(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		for k := range 2 {
			h.DisconnectPeer(other(h, leader, k+1))
		}
		before := h.Server(leader).Status().Last
		for range 100 {
			h.Server(leader).Submit(make([]byte, 100))
			time.Sleep(time.Microsecond) // the disk is done with the one before
		}
		if got := h.Server(leader).Status().Last - before; got < 10 || got > 40 {
			t.Errorf("a leader without quorum appended %d commands of 100 bytes, allowed are 2000 and 2000 more", got)
		}
	}, configured(func(c *Config) { c.MaxUncommittedBytes, c.MaxQueueBytes, c.MaxCommandBytes = 2000, 2000, 1000 }))
}

func TestProposeSuperseded(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		first, _ := h.CheckSingleLeader()
		h.DisconnectPeer(first)
		p := h.Server(first).Submit(cmd(1))
		second, _ := h.CheckSingleLeader()
		submit(t, h, second, 2, 3)
		committedOn(h, 2, 2, 3)
		h.ReconnectPeer(first)
		_, err := p.Wait(within(t, 5*time.Second))
		rejected(t, "another leader's entry is in its place", err, ErrSuperseded)
		committedOn(h, 3, 2, 3)
		h.CheckNotCommitted(cmd(1))
	})
}

// A proposal ends even if nobody ever proposes again, so that no entry takes
// its place: the next leader's first entry says enough.
func TestProposeSupersededWithoutSuccessor(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		first, term := h.CheckSingleLeader()
		h.DisconnectPeer(first)
		var ps []*Proposal
		for i := range 5 {
			ps = append(ps, h.Server(first).Submit(cmd(i)))
			time.Sleep(time.Microsecond) // they become entries of their own
		}
		must(t, h, "another leader", func() bool {
			_, newTerm := h.CheckSingleLeader()
			return newTerm > term
		})
		h.ReconnectPeer(first)
		for i, p := range ps {
			_, err := p.Wait(within(t, 5*time.Second))
			rejected(t, fmt.Sprintf("command %d", i), err, ErrSuperseded)
		}
		for i := range ps {
			h.CheckNotCommitted(cmd(i))
		}
	})
}

// Whoever waits when a node stops is told, truthfully.
func TestProposeStopped(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		for i := range h.n {
			h.DisconnectPeer(i)
		}
		appended := h.Server(leader).Submit(cmd(1))
		must(t, h, "the leader steps down", func() bool { return h.Server(leader).Status().Role != Leader })
		queued := h.Server(leader).Submit(cmd(2))
		waiting := make(chan error, 2)
		go func() { waiting <- h.Server(leader).WaitApplied(t.Context(), 1000) }()
		go func() {
			_, _, err := h.Server(leader).WaitLeadership(t.Context())
			waiting <- err
		}()
		time.Sleep(time.Millisecond)
		h.CrashPeer(leader)
		_, err := appended.Wait(t.Context())
		unknown(t, "appended", err, ErrStopped)
		_, err = queued.Wait(t.Context())
		rejected(t, "queued", err, ErrStopped)
		_, err = h.Server(leader).Propose(t.Context(), cmd(3))
		rejected(t, "proposed to a closed node", err, ErrStopped)
		for range 2 {
			if err := <-waiting; !errors.Is(err, ErrStopped) {
				t.Errorf("a wait on a closed node: %v", err)
			}
		}
		if err := h.Server(leader).WaitApplied(t.Context(), 1000); !errors.Is(err, ErrStopped) {
			t.Errorf("WaitApplied on a closed node: %v", err)
		}
		if _, _, err := h.Server(leader).WaitLeadership(t.Context()); !errors.Is(err, ErrStopped) {
			t.Errorf("WaitLeadership on a closed node: %v", err)
		}
	})
}

// A proposal's wait always ends, whatever becomes of leaders meanwhile.
func TestProposeEndsDuringChanges(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		h.Delay(time.Millisecond, 5*time.Millisecond)
		ctx := within(t, 20*time.Second)
		var wg sync.WaitGroup
		var done atomic.Int64
		for i := range h.n {
			wg.Go(func() {
				for k := range 100 {
					p := h.Server(i).Submit(cmd(1000*i + k))
					if _, err := p.Wait(ctx); errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("proposal %d on node %d did not end", k, i)
						return
					}
					done.Add(1)
				}
			})
		}
		for range 10 {
			leader, term := h.CheckSingleLeader()
			h.DisconnectPeer(leader)
			must(t, h, "another leader", func() bool {
				_, newTerm := h.CheckSingleLeader()
				return newTerm > term
			})
			h.ReconnectPeer(leader)
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
		if done.Load() != int64(100*h.n) {
			t.Errorf("%d proposals ended", done.Load())
		}
		h.CheckLogsMatch()
	})
}

func TestWaitApplied(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		for i := range 20 {
			r, err := h.Server(leader).Propose(t.Context(), cmd(i))
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if err := h.Server(follower).WaitApplied(t.Context(), r.Index); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took > 50*time.Millisecond {
				t.Errorf("the follower took %v, more than a heartbeat", took)
			}
			if _, ok := h.nodes[follower].machine.find(cmd(i)); !ok {
				t.Errorf("command %d is not applied on the follower", i)
			}
		}
		if err := h.Server(follower).WaitApplied(within(t, time.Second), 1000); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an entry that does not exist: %v", err)
		}
		cm := h.Server(follower).cm
		cm.mu.Lock()
		defer cm.unlock()
		if n := len(cm.pending.waits); n != 0 {
			t.Errorf("%d waits are left behind", n)
		}
	})
}

func TestWaitLeadership(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		ctx, token, err := h.Server(leader).WaitLeadership(t.Context())
		if err != nil || token != term || ctx.Err() != nil {
			t.Fatalf("the leader of term %d: term %d, %v, %v", term, token, err, ctx.Err())
		}
		if st := h.Server(leader).Status(); st.Applied < 2 {
			t.Errorf("applied %d, the term's first entry is 2", st.Applied)
		}
		follower := other(h, leader, 1)
		if _, _, err := h.Server(follower).WaitLeadership(within(t, time.Second)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a follower: %v", err)
		}
		h.DisconnectPeer(leader)
		second, newTerm := h.CheckSingleLeader()
		ctx2, token2, err := h.Server(second).WaitLeadership(t.Context())
		if err != nil || token2 != newTerm || token2 <= token || ctx2.Err() != nil {
			t.Errorf("the next leader: token %d after %d, %v", token2, token, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
			t.Error("the old leader's context does not end")
		}
		h.ReconnectPeer(leader)
		if err := h.Server(second).Close(); err != nil {
			t.Error(err)
		}
		h.nodes[second].running = false
		if !isClosed(ctx2.Done()) {
			t.Error("the context of a closed leader does not end")
		}
	})
}

// The heartbeat goroutine and the leadership context belong to one term: a
// leader that is elected again has one of each.
func TestOneHeartbeatLoop(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		led := map[int]int{}
		for round := range 20 {
			leader, term := h.CheckSingleLeader()
			led[leader]++
			loops := 0
			for _, g := range ownGoroutines() {
				if strings.Contains(g, "runHeartbeats") {
					loops++
				}
			}
			if loops != 1 {
				t.Errorf("round %d: %d heartbeat goroutines", round, loops)
			}
			h.DisconnectPeer(leader)
			must(t, h, "the next leader", func() bool {
				_, newTerm := h.CheckSingleLeader()
				return newTerm > term && h.Server(leader).Status().Role != Leader
			})
			h.ReconnectPeer(leader)
			time.Sleep(200 * time.Millisecond)
		}
		again := 0
		for _, n := range led {
			again = max(again, n)
		}
		if again < 2 {
			t.Error("nobody was elected twice")
		}
	})
}

// Events come recent ones first and then live; a slow reader learns how many it
// missed; the sequence ends with the node. More than 70 lines: it is one story.
func TestEvents(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		s := h.Server(leader)
		elected, live := false, make(chan Event, 100)
		go func() {
			defer close(live)
			for e := range s.Events(t.Context()) {
				live <- e
			}
		}()
		time.Sleep(time.Millisecond)
		first := true
		for len(live) > 0 {
			e := <-live
			if first && e.Kind != EventStarted {
				t.Errorf("the first event is %q", e)
			}
			first = false
			if e.Node != s.conf.ID || e.Dropped != 0 || e.Time.IsZero() {
				t.Errorf("event of node %q, %d dropped, at %v", e.Node, e.Dropped, e.Time)
			}
			elected = elected || e.Kind == EventElected && e.Term == term && e.Votes >= 2
		}
		if !elected {
			t.Error("the election is not among the recent events")
		}
		h.DisconnectPeer(leader)
		deadline := time.After(time.Second)
		for lost := false; !lost; {
			select {
			case e := <-live:
				lost = e.Kind == EventQuorumLost
			case <-deadline:
				t.Fatal("no event says that the quorum is lost")
			}
		}

		// A reader that stops while 2000 events come.
		sum, read := uint64(0), uint64(0)
		for e := range s.Events(t.Context()) {
			if read == 0 {
				for range 2000 {
					s.report("peer", "test", fmt.Errorf("%w", errors.New("")))
					s.mu.Lock()
					clear(s.logged)
					s.mu.Unlock()
				}
			}
			sum, read = sum+e.Dropped, read+1
			if sum+read >= 2000 {
				break
			}
		}
		if sum == 0 || read > recentEvents+1 {
			t.Errorf("%d events read and %d dropped of 2000, with room for %d", read, sum, recentEvents)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range s.Events(ctx) { // recent events come all the same, and then it ends
		}
		s.Close()
		h.nodes[leader].running = false
		for range live {
		}
		var dead Event
		for e := range s.Events(t.Context()) {
			dead = e
		}
		if dead.Kind != EventDead {
			t.Errorf("the last event is %q", dead)
		}
	})
}

// Recent events come whether the context has ended or not; later ones do not,
// also where there always is another one.
func TestEventsEndWithContext(t *testing.T) {
	for _, before := range []int{0, 5} {
		l := &eventLog{}
		l.add(make([]Event, before))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		n := 0
		for range l.all(ctx) {
			l.add(make([]Event, 1))
			if n++; n > 100 {
				break
			}
		}
		if n != before {
			t.Errorf("%d events after the end of the context, want the %d recent ones", n, before)
		}
		ctx, cancel = context.WithCancel(t.Context())
		n = 0
		l.add(make([]Event, 1))
		for range l.all(ctx) {
			l.add(make([]Event, 1))
			if n++; n == 50 {
				cancel()
			} else if n > 100 {
				break
			}
		}
		cancel()
		if n != 50 {
			t.Errorf("%d events, the context ended in the 50th", n)
		}
	}
}

// failing is a storage whose disk fails on demand.
type failing struct {
	Storage
	broken atomic.Bool
	tries  atomic.Int64 // flushes after the first failure
}

var errDisk = errors.New("the disk is on fire")

func (f *failing) Flush() (LSN, error) {
	if f.broken.Load() {
		f.tries.Add(1)
		return 0, errDisk
	}
	return f.Storage.Flush()
}

// A failed fsync is final: the node acknowledges nothing any more, gives
// leadership up and says why; the others go on.
func TestDiskFails(t *testing.T) {
	for _, role := range []Role{Leader, Follower} {
		t.Run(role.String(), func(t *testing.T) {
			disks := make([]*failing, 3)
			virtual(t, 3, func(t *testing.T, h *Harness) {
				leader, term := h.CheckSingleLeader()
				submit(t, h, leader, 1)
				committedOn(h, 3, 1)
				victim := leader
				if role == Follower {
					victim = other(h, leader, 1)
				}
				s := h.Server(victim)
				disks[victim].broken.Store(true)
				p := h.Server(leader).Submit(cmd(2))
				select {
				case <-s.Done():
				case <-time.After(time.Second):
					t.Fatal("the node does not end")
				}
				if err := s.Err(); !errors.Is(err, errDisk) {
					t.Errorf("Err: %v", err)
				}
				st := s.Status()
				if st.Role != Dead || !errors.Is(st.Err, errDisk) || st.Term != term || st.Last == 0 || st.ID == "" {
					t.Errorf("Status after the failure: %+v", st)
				}
				if role == Leader {
					if _, err := p.Wait(t.Context()); err != nil {
						unknown(t, "proposed to the leader that failed", err, ErrStopped)
					}
				}
				_, err := s.Propose(t.Context(), cmd(3))
				rejected(t, "proposed after the failure", err, ErrStopped)
				if err := s.Close(); err != nil {
					t.Errorf("Close after the failure: %v", err)
				}
				h.CrashPeer(victim) // the failure was meant
				next, _ := h.CheckSingleLeader()
				submit(t, h, next, 4)
				committedOn(h, 2, 4)
				if n := disks[victim].tries.Load(); n > 2 {
					t.Errorf("%d more writes were tried after one had failed", n)
				}
			}, WithConfig(func(i int, c *Config) {
				disks[i] = &failing{Storage: NewMemoryStorage()}
				c.Storage = disks[i]
			}))
		})
	}
}

// fragileMachine panics at a poisoned command while armed says so.
type fragileMachine struct {
	noSnapshots
	armed *atomic.Bool
	got   []string
}

func (m *fragileMachine) Apply(e Entry) []byte {
	if m.armed.Load() && bytes.HasPrefix(e.Data, []byte("poison")) {
		panic("can't take " + string(e.Data) + "\nand says so at length")
	}
	m.got = append(m.got, string(e.Data))
	return nil
}

// A panic in Apply stops applying at that entry. The node never skips it, hands
// leadership on, and goes on replicating and voting; fixed and restarted, it
// catches up.
func TestApplyPanics(t *testing.T) {
	var armed []*atomic.Bool // of each start, in order: first those of nodes 0, 1 and 2
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		armed[leader].Store(true)
		poisoned := h.Server(leader)
		waits := make(chan error, 1)
		go func() { waits <- poisoned.WaitApplied(t.Context(), 1000) }()
		_, err := poisoned.Propose(t.Context(), []byte("poison"))
		var failure *ApplyError
		unknown(t, "the proposal that panicked", err, ErrOutcomeUnknown)
		if !errors.As(err, &failure) || failure.Index == 0 || !strings.Contains(failure.Stack, "fragileMachine") ||
			!strings.Contains(failure.Error(), "can't take poison") || strings.Contains(err.Error(), "\n") {
			t.Fatalf("the proposal that panicked: %v", err)
		}
		if err := <-waits; !errors.As(err, &failure) {
			t.Errorf("WaitApplied: %v", err)
		}
		st := poisoned.Status()
		if !errors.As(st.Err, &failure) || st.Role == Dead || st.Applied != failure.Index-1 || poisoned.Err() != nil {
			t.Errorf("Status: %v, applied %d, %v; Err %v", st.Role, st.Applied, st.Err, poisoned.Err())
		}
		_, err = poisoned.Propose(within(t, time.Second), cmd(2))
		rejected(t, "proposed to a node that applies nothing", err, ErrStopped)

		// One of the other two leads. Without the third, it needs the poisoned
		// node's acknowledgements, and after it the third needs its vote.
		var second int
		must(t, h, "another leader", func() bool {
			var newTerm Term
			second, newTerm = h.CheckSingleLeader()
			return newTerm > term
		})
		third := 3 - leader - second
		h.CheckCommittedN([]byte("poison"), 2)
		h.CrashPeer(third)
		submit(t, h, second, 3)
		committedOn(h, 1, 3)
		h.RestartPeer(third)
		committedOn(h, 2, 3)
		h.CrashPeer(second)
		holds(t, h, 3*time.Second, "the poisoned node does not lead", func() bool { return poisoned.Status().Role != Leader })
		if next, _ := h.CheckSingleLeader(); next != third {
			t.Errorf("node %d leads, want %d", next, third)
		}
		submit(t, h, third, 4)
		committedOn(h, 1, 4)

		h.CrashPeer(leader)
		h.RestartPeer(leader) // its new machine is not armed
		committedOn(h, 2, 1, 3, 4)
		h.CheckCommittedN([]byte("poison"), 2)
	}, WithStateMachine(func() StateMachine {
		armed = append(armed, &atomic.Bool{})
		return &fragileMachine{armed: armed[len(armed)-1]}
	}))
}

// Shutdown of a leader is over when another one leads, long before a crash
// would have been noticed.
func TestShutdownHandsOver(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		began := time.Now()
		if err := h.Server(leader).Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		took := time.Since(began)
		h.nodes[leader].running = false
		if took > 150*time.Millisecond+closeBound {
			t.Errorf("Shutdown took %v, more than an election timeout and Close", took)
		}
		if !isClosed(h.Server(leader).Done()) {
			t.Error("the node is not closed")
		}
		if _, newTerm := h.CheckSingleLeader(); newTerm <= term {
			t.Errorf("term %d after term %d", newTerm, term)
		}
		// Followers have nothing to hand over.
		next, _ := h.CheckSingleLeader()
		follower := 3 - leader - next
		began = time.Now()
		if err := h.Server(follower).Shutdown(t.Context()); err != nil || time.Since(began) > closeBound {
			t.Errorf("a follower's Shutdown: %v after %v", err, time.Since(began))
		}
		h.nodes[follower].running = false
		// Nobody is there to take over: a context bounds the wait.
		began = time.Now()
		if err := h.Server(next).Shutdown(within(t, 20*time.Millisecond)); err != nil || time.Since(began) > 20*time.Millisecond+closeBound {
			t.Errorf("Shutdown without a successor: %v after %v", err, time.Since(began))
		}
		h.nodes[next].running = false
	})
}

// The log has the stack of a panic in Apply, which the error's one line leaves out.
func TestPanicIsLoggedWithItsStack(t *testing.T) {
	var out bytes.Buffer
	l := &eventLog{node: "a", logger: slog.New(slog.NewTextHandler(&out, nil))}
	l.add([]Event{{Kind: EventApplyFailed, Index: 7, Err: &ApplyError{Index: 7, Value: "no", Stack: "frames"}}})
	l.log()
	if s := out.String(); !strings.Contains(s, "stack=frames") || strings.Count(s, "\n") != 1 {
		t.Errorf("logged %q", s)
	}
}

// Who starts a node with much data learns how far it has come.
func TestStartTellsHowFarItIs(t *testing.T) {
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		write := func(n int) {
			for range n {
				if _, err := h.Server(0).Propose(t.Context(), bytes.Repeat([]byte("x"), 1<<19)); err != nil {
					t.Fatal(err)
				}
			}
		}
		write(2)
		h.TakeSnapshot(0)
		write(8)
		h.CrashPeer(0)
		mem := h.nodes[0].disk.mem
		mem.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpRead {
				time.Sleep(progressPause / 3)
			}
			return nil
		})
		h.RestartPeer(0)
		mem.SetHook(nil)
		var told []string
		for _, e := range eventsOf(h.Server(0)) {
			if e.Kind == EventStarting {
				told = append(told, e.String())
			}
		}
		all := strings.Join(told, "\n")
		t.Log(all)
		for _, want := range []string{
			`(?m)^starts: reads its log, [1-9] of \d+ MiB$`,
			`(?m)^starts: restores the snapshot up to entry \d+, 1 of 1 MiB$`,
		} {
			if !regexp.MustCompile(want).MatchString(all) {
				t.Errorf("no event says %s:\n%s", want, all)
			}
		}
	})
}
