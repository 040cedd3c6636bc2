package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"example.com/raft"
)

// raftSystem drives three nodes of this project's library with its default
// timing. Proposals go to the leader. A round during which leadership moved is
// an error, because it is not the round that was meant to be measured.
type raftSystem struct {
	servers  []*raft.Server
	machines []*countingMachine

	leader     int
	leadership context.Context // ends when the leader of Start loses its leadership
	release    context.CancelFunc
}

func newRaft() (System, error) { return &raftSystem{}, nil }

// countingMachine is the state machine with the least work: it counts.
type countingMachine struct{ counts }

func (m *countingMachine) Apply(e raft.Entry) []byte {
	m.add(e.Data)
	return nil
}

func (m *countingMachine) Snapshot() (raft.Capture, error) {
	state := m.encode()
	return raft.CaptureFunc(func(_ context.Context, w io.Writer) error {
		_, err := w.Write(state)
		return err
	}), nil
}

func (m *countingMachine) Restore(r io.Reader) error {
	state, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	return m.decode(state)
}

func (r *raftSystem) Start(dir string) error {
	var members []raft.Member
	var listeners []net.Listener
	for i := range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return errors.Join(err, closeAll(listeners))
		}
		listeners = append(listeners, l)
		members = append(members, raft.Member{ID: raft.NodeID(fmt.Sprintf("n%d", i)), Addr: l.Addr().String()})
	}
	ctx, cancel := context.WithTimeout(context.Background(), formation)
	defer cancel()
	for i, l := range listeners {
		home := filepath.Join(dir, string(members[i].ID))
		m := &countingMachine{}
		err := os.Mkdir(home, 0o755)
		var s *raft.Server
		if err == nil {
			s, err = raft.Start(ctx, raft.Config{
				ID:           members[i].ID,
				ClusterID:    "bench",
				StateMachine: m,
				Dir:          home,
				Bootstrap:    members,
				Listener:     l,
				Logger:       slog.New(slog.DiscardHandler),
			})
		}
		if err != nil {
			// A started server closes its own listener.
			return errors.Join(fmt.Errorf("node %s: %w", members[i].ID, err), closeAll(listeners[i:]), r.Stop())
		}
		r.servers, r.machines = append(r.servers, s), append(r.machines, m)
	}
	if err := r.waitForLeader(ctx); err != nil {
		return errors.Join(err, r.Stop())
	}
	return nil
}

func closeAll(listeners []net.Listener) error {
	var errs []error
	for _, l := range listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// waitForLeader waits until one of the servers leads and has caught up. It
// keeps that server's leadership context, so that Check can tell whether it
// still leads.
func (r *raftSystem) waitForLeader(ctx context.Context) error {
	type answer struct {
		node       int
		leadership context.Context
		err        error
	}
	answers := make(chan answer, len(r.servers))
	cancels := make([]context.CancelFunc, len(r.servers))
	var wg sync.WaitGroup
	for i, s := range r.servers {
		var wait context.Context
		// Not derived from ctx: the winner's has to outlive it.
		wait, cancels[i] = context.WithCancel(context.Background())
		wg.Go(func() {
			leadership, _, err := s.WaitLeadership(wait)
			answers <- answer{i, leadership, err}
		})
	}
	winner := -1
	var failed error
	for waiting := len(r.servers); waiting > 0 && winner < 0; {
		select {
		case a := <-answers:
			waiting--
			if a.err != nil {
				failed = errors.Join(failed, a.err)
				continue
			}
			winner = a.node
			r.leader, r.leadership, r.release = a.node, a.leadership, cancels[a.node]
		case <-ctx.Done():
			failed = errors.Join(failed, fmt.Errorf("no leader within %v: %w", formation, ctx.Err()))
			waiting = 0
		}
	}
	for i, cancel := range cancels {
		if i != winner {
			cancel()
		}
	}
	wg.Wait()
	if winner < 0 {
		return failed
	}
	return nil
}

func (r *raftSystem) Propose(ctx context.Context, payload []byte) error {
	_, err := r.servers[r.leader].Propose(ctx, payload)
	return err
}

// Check makes sure that one leader served the whole round and that it applied
// exactly what was acknowledged.
func (r *raftSystem) Check(ops int64, size int) error {
	if r.leadership.Err() != nil {
		return fmt.Errorf("leadership moved during the round: %w; run it again on a quieter machine", r.leadership.Err())
	}
	return r.machines[r.leader].check(ops, size)
}

func (r *raftSystem) Stop() error {
	var errs []error
	for _, s := range r.servers {
		errs = append(errs, s.Close())
	}
	if r.release != nil {
		r.release()
	}
	return errors.Join(errs...)
}
