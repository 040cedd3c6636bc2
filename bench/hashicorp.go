package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
)

// How github.com/hashicorp/raft is tuned. What is not here has the library's
// default.
const (
	hashicorpBatch    = 1024        // MaxAppendEntries: the most entries in one write and in one message; more is refused
	hashicorpCache    = 2048        // entries in memory: two full messages, so replication reads none from the disk
	hashicorpSnapshot = time.Second // how often a node looks whether a snapshot is due; the default of 2 minutes never came in a round
	hashicorpTimeout  = 10 * time.Second
)

// hashicorpSystem drives three nodes of github.com/hashicorp/raft with its TCP
// transport and github.com/hashicorp/raft-wal. The first node leads: it alone
// knows the members at the start, so nobody else can become a candidate.
type hashicorpSystem struct {
	nodes []*hashicorpNode
	term  uint64 // in which the first node leads

	mu      sync.RWMutex // held for reading while a proposal is queued
	stopped bool
}

var errHashicorpStopped = errors.New("hashicorp/raft is stopped")

// hashicorpNode is one node and what it has open.
type hashicorpNode struct {
	raft  *hraft.Raft
	trans *hraft.NetworkTransport
	log   *wal.WAL
	meta  *metadb.BoltMetaDB // the log's, which does not close it
	fsm   *hashicorpMachine
}

func newHashicorp() *hashicorpSystem { return &hashicorpSystem{} }

func (h *hashicorpSystem) Start(dir string) error {
	var members hraft.Configuration
	for i := range 3 {
		n := &hashicorpNode{}
		h.nodes = append(h.nodes, n)
		id := hraft.ServerID(fmt.Sprintf("n%d", i))
		if err := n.open(id, filepath.Join(dir, string(id))); err != nil {
			return errors.Join(fmt.Errorf("node %s: %w", id, err), h.Stop())
		}
		members.Servers = append(members.Servers, hraft.Server{ID: id, Address: n.trans.LocalAddr()})
	}
	if err := h.lead(members); err != nil {
		return errors.Join(err, h.Stop())
	}
	return nil
}

func (n *hashicorpNode) open(id hraft.ServerID, home string) (err error) {
	if err := os.Mkdir(home, 0o755); err != nil {
		return err
	}
	quiet := hclog.NewNullLogger()
	n.meta = &metadb.BoltMetaDB{}
	n.log, err = wal.Open(home, wal.WithMetaStore(n.meta), wal.WithLogger(quiet))
	if err != nil {
		return err
	}
	cache, err := hraft.NewLogCache(hashicorpCache, n.log)
	if err != nil {
		return err
	}
	snapshots, err := hraft.NewFileSnapshotStoreWithLogger(home, 1, quiet)
	if err != nil {
		return err
	}
	// The transport's own default for messages in flight, 2, is what its
	// documentation recommends: while they are under way the next one grows.
	n.trans, err = hraft.NewTCPTransportWithConfig("127.0.0.1:0", nil, &hraft.NetworkTransportConfig{
		Logger: quiet, MaxPool: 3, Timeout: hashicorpTimeout,
	})
	if err != nil {
		return err
	}
	c := hraft.DefaultConfig()
	c.LocalID = id
	c.Logger = quiet
	c.MaxAppendEntries = hashicorpBatch
	c.BatchApplyCh = true
	c.SnapshotInterval = hashicorpSnapshot
	c.NoLegacyTelemetry = true // its metrics would be counted twice
	n.fsm = &hashicorpMachine{}
	n.raft, err = hraft.NewRaft(c, n.fsm, cache, n.log, snapshots, n.trans)
	return err
}

// lead makes the first node the leader and waits until it has committed an
// entry, which takes one to two of the default election timeouts of 1 s.
func (h *hashicorpSystem) lead(members hraft.Configuration) error {
	first := h.nodes[0].raft
	if err := first.BootstrapCluster(members).Error(); err != nil {
		return err
	}
	select {
	case <-first.LeaderCh():
	case <-time.After(formation):
		return fmt.Errorf("no leader within %v", formation)
	}
	if err := first.Barrier(formation).Error(); err != nil {
		return fmt.Errorf("the first commit: %w", err)
	}
	h.term = first.CurrentTerm()
	return nil
}

// Propose copies the payload, which the library keeps.
func (h *hashicorpSystem) Propose(ctx context.Context, payload []byte) error {
	h.mu.RLock()
	if h.stopped {
		h.mu.RUnlock()
		return errHashicorpStopped
	}
	future := h.nodes[0].raft.Apply(bytes.Clone(payload), 0)
	h.mu.RUnlock()
	if ctx.Done() == nil {
		return future.Error()
	}
	// A future can't be given up. Its waiter ends with it, or with Stop.
	done := make(chan error, 1)
	go func() { done <- future.Error() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *hashicorpSystem) Check(ops int64, size int) error {
	n := h.nodes[0]
	if state, term := n.raft.State(), n.raft.CurrentTerm(); state != hraft.Leader || term != h.term {
		return fmt.Errorf("leadership moved during the round: the leader of term %d is %v in term %d; run it again on a quieter machine", h.term, state, term)
	}
	return n.fsm.check(ops, size)
}

// Stop closes each transport's connections only after all nodes are down: the
// handlers of the other sides end with them.
func (h *hashicorpSystem) Stop() error {
	h.mu.Lock()
	h.stopped = true
	h.mu.Unlock()
	var errs []error
	if h.term > 0 {
		// With BatchApplyCh, what is queued when a node shuts down never gets an
		// answer. A barrier queues behind it and so returns after it; whether it
		// succeeds does not matter.
		_ = h.nodes[0].raft.Barrier(0).Error()
	}
	for _, n := range h.nodes {
		if n.raft != nil {
			errs = append(errs, n.raft.Shutdown().Error())
		}
		if n.trans != nil {
			errs = append(errs, n.trans.Close())
		}
	}
	for _, n := range h.nodes {
		if n.trans != nil {
			n.trans.CloseStreams()
		}
		if n.log != nil {
			errs = append(errs, n.log.Close())
		}
		if n.meta != nil {
			errs = append(errs, n.meta.Close())
		}
	}
	return errors.Join(errs...)
}

// hashicorpMachine counts, a whole batch of entries in one call.
type hashicorpMachine struct {
	counts
	responses []any // nil ones, used again: the library reads them before the next call
}

func (m *hashicorpMachine) Apply(l *hraft.Log) any {
	m.add(l.Data)
	return nil
}

func (m *hashicorpMachine) ApplyBatch(logs []*hraft.Log) []any {
	for _, l := range logs {
		if l.Type == hraft.LogCommand {
			m.add(l.Data)
		}
	}
	for len(m.responses) < len(logs) {
		m.responses = append(m.responses, nil)
	}
	return m.responses[:len(logs)]
}

func (m *hashicorpMachine) Snapshot() (hraft.FSMSnapshot, error) {
	return hashicorpSnapshotState(m.encode()), nil
}

func (m *hashicorpMachine) Restore(r io.ReadCloser) error {
	state, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil {
		return err
	}
	return m.decode(state)
}

// hashicorpSnapshotState is the captured state.
type hashicorpSnapshotState []byte

func (s hashicorpSnapshotState) Persist(sink hraft.SnapshotSink) error {
	if _, err := sink.Write(s); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

func (s hashicorpSnapshotState) Release() {}
