// Package cluster starts three nodes in one process, as several commands of this
// module need them.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"example.com/raft"
)

// Size is the number of nodes.
const Size = 3

// formation bounds how long fresh nodes may take to have a leader.
const formation = 30 * time.Second

// Machine is the state machine: how far it has applied, and how many commands.
// It may be read from any goroutine.
type Machine struct {
	applied, commands atomic.Uint64
}

// Apply counts.
func (m *Machine) Apply(e raft.Entry) []byte {
	m.commands.Add(1)
	m.applied.Store(uint64(e.Index))
	return nil
}

// Applied is the index of the newest command applied.
func (m *Machine) Applied() raft.Index { return raft.Index(m.applied.Load()) }

// Snapshot captures both numbers.
func (m *Machine) Snapshot() (raft.Capture, error) {
	return raft.CaptureBytes(fmt.Appendln(nil, m.applied.Load(), m.commands.Load())), nil
}

// Restore replaces both numbers.
func (m *Machine) Restore(r io.Reader) error {
	var applied, commands uint64
	if _, err := fmt.Fscan(r, &applied, &commands); err != nil {
		return err
	}
	m.applied.Store(applied)
	m.commands.Store(commands)
	return nil
}

// Cluster is three running nodes.
type Cluster struct {
	Servers  []*raft.Server
	Machines []*Machine
}

// Config is the part of a node's configuration that is alike in all commands.
func Config(dir string, id raft.NodeID, members []raft.Member, m *Machine) raft.Config {
	return raft.Config{
		ID: id, ClusterID: "bench", StateMachine: m, Dir: filepath.Join(dir, string(id)),
		Bootstrap: members, Logger: slog.New(slog.DiscardHandler),
	}
}

// Start starts the nodes in directories under dir, and returns when one of them
// leads. edit may change the configuration of node i; it may be nil.
func Start(ctx context.Context, dir string, edit func(i int, c *raft.Config)) (_ *Cluster, err error) {
	c := &Cluster{}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	listeners, members, err := Listen()
	if err != nil {
		return nil, err
	}
	for i, l := range listeners {
		m := &Machine{}
		conf := Config(dir, members[i].ID, members, m)
		conf.Listener = l
		if edit != nil {
			edit(i, &conf)
		}
		s, err := raft.Start(ctx, conf)
		if err != nil {
			for _, l := range listeners[i:] {
				l.Close() // a node that has started closes its own
			}
			return nil, fmt.Errorf("node %s: %w", members[i].ID, err)
		}
		c.Servers, c.Machines = append(c.Servers, s), append(c.Machines, m)
	}
	ctx, cancel := context.WithTimeout(ctx, formation)
	defer cancel()
	_, err = c.Leader(ctx)
	return c, err
}

// Listen returns a listener on loopback for each node, and the nodes as members.
func Listen() (listeners []net.Listener, members []raft.Member, err error) {
	for i := range Size {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, nil, err
		}
		listeners = append(listeners, l)
		members = append(members, raft.Member{ID: raft.NodeID(fmt.Sprintf("n%d", i)), Addr: l.Addr().String()})
	}
	return listeners, members, nil
}

// Leader returns the node that leads and has caught up, once there is one.
func (c *Cluster) Leader(ctx context.Context) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		node int
		err  error
	}
	answers := make(chan answer, len(c.Servers))
	for i, s := range c.Servers {
		go func() {
			_, _, err := s.WaitLeadership(ctx)
			answers <- answer{i, err}
		}()
	}
	leader, failed := -1, error(nil)
	for range c.Servers { // every goroutine is waited for
		a := <-answers
		switch {
		case a.err == nil && leader < 0:
			leader = a.node
			cancel()
		case leader < 0:
			failed = errors.Join(failed, a.err)
		}
	}
	if leader < 0 {
		return -1, fmt.Errorf("no node leads: %w", failed)
	}
	return leader, nil
}

// Stop closes all nodes.
func (c *Cluster) Stop() error {
	var errs []error
	for _, s := range c.Servers {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// TempDir makes a directory for the data, in dir or, if that is empty, in the
// current one, because the usual temporary directory may be in memory.
func TempDir(dir string) (string, func() error, error) {
	if dir == "" {
		dir = "."
	}
	d, err := os.MkdirTemp(dir, "raft-bench-")
	if err != nil {
		return "", nil, fmt.Errorf("-dir: %w", err)
	}
	return d, func() error { return os.RemoveAll(d) }, nil
}
