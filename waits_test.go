package raft

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/vfs"
)

// stopper is a state machine whose Apply of one command waits and then panics,
// and whose snapshots take for ever.
type stopper struct{ release chan struct{} }

func (m *stopper) Apply(e Entry) []byte {
	if string(e.Data) == "panic" && m.release != nil {
		<-m.release
		panic("as asked for")
	}
	return e.Data
}

func (*stopper) Snapshot() (Capture, error) {
	return CaptureFunc(func(ctx context.Context, _ io.Writer) error { <-ctx.Done(); return ctx.Err() }), nil
}

func (*stopper) Restore(io.Reader) error { return nil }

// proposalErrors are those that a proposal may end with.
var proposalErrors = []error{ErrNoLeader, ErrOverloaded, ErrDiskFull, ErrStopped, ErrSuperseded, ErrOutcomeUnknown}

// waitingCalls are all public calls that wait, and what their errors must match,
// beside the error of their context. Those marked early are made while the node
// still leads.
var waitingCalls = []struct {
	name   string
	early  bool
	errors []error
	call   func(ctx context.Context, s *Server) error
}{
	{"Propose", false, proposalErrors, func(ctx context.Context, s *Server) error {
		_, err := s.Propose(ctx, []byte("x"))
		return err
	}},
	{"Propose, appended", true, proposalErrors, func(ctx context.Context, s *Server) error {
		_, err := s.Propose(ctx, []byte("y"))
		return err
	}},
	{"Submit and Wait", true, proposalErrors, func(ctx context.Context, s *Server) error {
		_, err := s.Submit([]byte("z")).Wait(ctx)
		return err
	}},
	{"OpenSession", false, proposalErrors, func(ctx context.Context, s *Server) error {
		_, err := s.OpenSession(ctx)
		return err
	}},
	{"ProposeOnce", true, append([]error{ErrSessionExpired}, proposalErrors...), func(ctx context.Context, s *Server) error {
		_, err := s.ProposeOnce(ctx, RequestID{Session: 1, Seq: 1}, []byte("once"))
		return err
	}},
	{"ReadIndex", false, []error{ErrNoLeader, ErrStopped, &ApplyError{}}, func(ctx context.Context, s *Server) error {
		_, err := s.ReadIndex(ctx)
		return err
	}},
	{"WaitApplied", false, []error{ErrStopped, &ApplyError{}}, func(ctx context.Context, s *Server) error {
		return s.WaitApplied(ctx, 1<<40)
	}},
	{"WaitLeadership", false, []error{ErrStopped}, func(ctx context.Context, s *Server) error {
		leading, _, err := s.WaitLeadership(ctx)
		if err == nil {
			select {
			case <-leading.Done():
			case <-ctx.Done():
			}
		}
		return err
	}},
	{"AddVoter", true, []error{ErrStopped, ErrSuperseded, ErrOutcomeUnknown, &MembershipError{}}, func(ctx context.Context, s *Server) error {
		return s.AddVoter(ctx, Member{ID: "new", Addr: "nobody:1"})
	}},
	{"TransferLeadership", true, []error{ErrStopped, &TransferError{}}, func(ctx context.Context, s *Server) error {
		return s.TransferLeadership(ctx, "")
	}},
	{"TakeSnapshot", false, []error{ErrStopped, &SnapshotError{}}, func(ctx context.Context, s *Server) error {
		return s.TakeSnapshot(ctx)
	}},
}

// documented tells whether an error is one of a list, or its context's.
func documented(err error, list []error) bool {
	return slices.ContainsFunc(append([]error{context.DeadlineExceeded}, list...), func(want error) bool {
		switch want.(type) {
		case *ApplyError:
			var e *ApplyError
			return errors.As(err, &e)
		case *MembershipError:
			var e *MembershipError
			return errors.As(err, &e)
		case *TransferError:
			var e *TransferError
			return errors.As(err, &e)
		case *SnapshotError:
			var e *SnapshotError
			return errors.As(err, &e)
		}
		return errors.Is(err, want)
	})
}

// waitEnd is what ends all waits of a node, one second after they began.
type waitEnd struct {
	name    string
	alone   bool          // the others are gone for ever
	timeout time.Duration // of the contexts
	bound   time.Duration // by which all calls have returned
	do      func(h *Harness, node int, release chan struct{})
}

var waitEnds = []waitEnd{
	{"its context", true, time.Second, time.Second, nil},
	{"Close", true, time.Hour, 2 * time.Second, func(h *Harness, node int, _ chan struct{}) {
		if err := h.Server(node).Close(); err != nil {
			h.t.Errorf("Close: %v", err)
		}
	}},
	{"Shutdown", true, time.Hour, 2 * time.Second, func(h *Harness, node int, _ chan struct{}) {
		if err := h.Server(node).Shutdown(context.Background()); err != nil {
			h.t.Errorf("Shutdown: %v", err)
		}
	}},
	{"a failed fsync", true, time.Hour, 2 * time.Second, func(h *Harness, node int, _ chan struct{}) {
		h.nodes[node].disk.mem.SetHook(func(op vfs.Op) error {
			if op.Kind == vfs.OpSync {
				return errDisk
			}
			return nil
		})
		h.Server(node).cm.step(func(c *core) { c.becomeCandidate(ReasonTransfer) }) // it has a vote to save
	}},
	{"a panic", false, 5 * time.Second, 5 * time.Second, func(_ *Harness, _ int, release chan struct{}) { close(release) }},
}

// Every wait ends: with a result, or with a documented error, within a bound,
// whatever ends it: its context, Close, Shutdown, a failed fsync, or a panic of
// the state machine, where there is no majority any more.
func TestEveryWaitEnds(t *testing.T) {
	for _, end := range waitEnds {
		t.Run(end.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { everyWaitEnds(t, end) })
		})
	}
}

func everyWaitEnds(t *testing.T, end waitEnd) {
	machines := make([]*stopper, 3)
	h := NewHarness(t, 3, WithStateMachineOf(func(i int) StateMachine {
		machines[i] = &stopper{}
		return machines[i]
	}))
	defer h.Shutdown()
	node, _ := h.CheckSingleLeader()
	release := make(chan struct{})
	if end.alone {
		h.CrashPeer((node + 1) % 3)
		h.CrashPeer((node + 2) % 3)
	} else {
		h.Read(node, func(StateMachine) []byte { machines[node].release = release; return nil })
		h.Server(node).Submit([]byte("panic"))
		synctest.Wait() // its Apply waits
	}
	began := time.Now()
	var wg sync.WaitGroup
	start := func(early bool) {
		for _, call := range waitingCalls {
			if call.early != early {
				continue
			}
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), end.timeout-time.Since(began))
				defer cancel()
				err := call.call(ctx, h.Server(node))
				took := time.Since(began)
				if took > end.bound {
					t.Errorf("%s returned after %v, the bound is %v: %v", call.name, took, end.bound, err)
				}
				if err != nil && !documented(err, call.errors) {
					t.Errorf("%s: an error that its documentation does not mention: %v", call.name, err)
				}
				t.Logf("%-20s after %v: %v", call.name, took, err)
			})
			synctest.Wait() // one after the other: a transfer, the last of them, keeps proposals waiting
		}
	}
	start(true)
	later := time.NewTimer(500 * time.Millisecond)
	<-later.C // the node has stepped down, if it is alone
	start(false)
	later.Reset(500 * time.Millisecond)
	<-later.C
	if end.do != nil {
		end.do(h, node, release)
	}
	wg.Wait()
	h.CrashPeer(node)
}

// A leader that steps down tells nobody that a command has failed which its
// successor then commits: it does not know.
func TestSteppingDownRejectsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		old, term := h.CheckSingleLeader()
		for i := range 3 { // slow for what is cut off 10 ms later, and quick beside an election timeout
			h.SlowDisk(i, 30*time.Millisecond)
		}
		p := h.Server(old).Submit([]byte("x"))
		time.Sleep(10 * time.Millisecond) // it is on its way to the disks of the others
		h.DisconnectPeer(old)
		if !h.eventually(func() bool { return h.Server(old).Status().Role == Follower }) {
			t.Fatal("the leader does not step down")
		}
		if _, now := h.CheckSingleLeader(); now <= term {
			t.Fatalf("term %d, was %d", now, term)
		}
		time.Sleep(time.Second)
		if isClosed(p.done) {
			t.Errorf("who has stepped down knows the outcome: %v", p.err)
		}
		h.ReconnectPeer(old)
		if _, err := p.Wait(within(t, 5*time.Second)); err != nil {
			t.Errorf("a command that is committed: %v", err)
		}
		h.CheckCommittedN([]byte("x"), 3)
	})
}
