package raft

import (
	"bytes"
	"cmp"
	"errors"
	"slices"
	"sync"
)

// This file is the harness's judge of linearizability. It needs no model of the
// state machine: the order of the log is the witness, and a machine fresh from
// the factory the model.

// history is what the nodes of a harness were asked, and what they answered.
type history struct {
	mu       sync.Mutex
	ops      []*historyOp
	open     []*historyOp // without an answer yet
	newest   Index        // the highest index that anybody was answered
	reads    []historyRead
	problems []string
}

type historyOp struct {
	node    NodeID
	cmd     []byte
	request RequestID // zero if it has none; several proposals may have one
	p       *Proposal
	floor   Index // everything up to here was answered before this began
}

// historyRead is a local read, as of entry index.
type historyRead struct {
	node   int
	index  Index
	f      func(StateMachine) []byte
	result []byte
}

// submitted notes a proposal that is about to be made.
func (h *history) submitted(node NodeID, cmd []byte, id *RequestID, p *Proposal) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.collect()
	op := &historyOp{node: node, cmd: bytes.Clone(cmd), p: p, floor: h.newest}
	if id != nil {
		op.request = RequestID{Session: id.Session, Seq: id.Seq}
		for _, o := range h.ops {
			if o.request == op.request {
				op.floor = o.floor // the command may have been executed since
				break
			}
		}
	}
	h.ops, h.open = append(h.ops, op), append(h.open, op)
}

// collect takes note of proposals that were answered. mu is held.
func (h *history) collect() {
	h.open = slices.DeleteFunc(h.open, func(op *historyOp) bool {
		if !isClosed(op.p.done) {
			return false
		}
		if op.p.err == nil {
			h.newest = max(h.newest, op.p.result.Index)
		}
		return true
	})
}

// readBegins returns what a read that begins now must include.
func (h *history) readBegins() Index {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.collect()
	return h.newest
}

// readAllowed notes that a node answered ReadIndex.
func (h *history) readAllowed(node NodeID, floor, index Index) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.newest = max(h.newest, index)
	if index < floor {
		h.problems = append(h.problems, "ReadIndex of node "+string(node)+" does not include what was answered before it began")
	}
}

func (h *history) read(r historyRead) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reads = append(h.reads, r)
}

// CheckLinearizable checks all that the nodes were asked so far. Every command
// that was answered is in the log, once, behind everything that was answered
// before it was proposed; every command that was rejected is not; ReadIndex
// came after what was answered before. Then all commands are applied again, in
// the order of the log, to a fresh state machine, which must give the same
// results, and the same answers to Read at the same place: so it also finds
// machines whose results depend on map order, time or chance.
//
// The fresh machine comes from WithStateMachine, or from WithStateMachineOf for
// node -1.
func (h *Harness) CheckLinearizable() {
	h.t.Helper()
	h.mu.Lock()
	var log []Entry
	for _, e := range h.applied {
		log = append(log, e)
	}
	h.mu.Unlock()
	slices.SortFunc(log, func(a, b Entry) int { return cmp.Compare(a.Index, b.Index) })
	h.history.mu.Lock()
	defer h.history.mu.Unlock()
	h.history.collect()
	for _, p := range h.history.problems {
		h.t.Errorf("%s", p)
	}
	h.checkOrder(log)
	h.replay(log)
}

// checkOrder compares what proposers were told with the log.
func (h *Harness) checkOrder(log []Entry) {
	h.t.Helper()
	type count struct{ answered, rejected, unknown, applied, distinct int }
	counts := map[string]*count{}
	requests := map[RequestID]bool{}
	var size *ResultSizeError
	at := map[Index]*historyOp{}
	of := func(cmd []byte) *count {
		if counts[string(cmd)] == nil {
			counts[string(cmd)] = &count{}
		}
		return counts[string(cmd)]
	}
	for _, e := range log {
		of(e.Data).applied++
	}
	for _, op := range h.history.ops {
		c := of(op.cmd)
		if op.request == (RequestID{}) || !requests[op.request] {
			requests[op.request] = true
			c.distinct++
		}
		switch {
		case !isClosed(op.p.done) || errors.Is(op.p.err, ErrOutcomeUnknown) || errors.As(op.p.err, &size):
			c.unknown++
			continue
		case op.p.err != nil:
			c.rejected++
			continue
		}
		c.answered++
		index := op.p.result.Index
		k, found := slices.BinarySearchFunc(log, index, func(e Entry, i Index) int { return cmp.Compare(e.Index, i) })
		switch {
		case !found || !bytes.Equal(log[k].Data, op.cmd):
			h.t.Errorf("node %s answered %.40q with index %d, where another command was applied, or none", op.node, op.cmd, index)
		case at[index] != nil && (op.request == (RequestID{}) || at[index].request != op.request):
			h.t.Errorf("nodes %s and %s answered two proposals of %.40q with index %d", at[index].node, op.node, op.cmd, index)
		case index <= op.floor:
			h.t.Errorf("node %s answered %.40q with index %d, and index %d was answered before it was proposed", op.node, op.cmd, index, op.floor)
		}
		at[index] = op
	}
	for cmd, c := range counts {
		if c.distinct > 0 && c.applied > c.distinct {
			h.t.Errorf("%.40q was applied %d times, and proposed %d times, sent again with the same RequestID not counted", cmd, c.applied, c.distinct)
		}
		if c.rejected > 0 && c.applied > c.answered+c.unknown {
			h.t.Errorf("%.40q was applied %d times; of its proposals %d were answered, %d have an unknown outcome and %d were rejected, which never are", cmd, c.applied, c.answered, c.unknown, c.rejected)
		}
	}
}

// replay applies the log to a fresh machine and compares results and reads.
func (h *Harness) replay(log []Entry) {
	h.t.Helper()
	answers := map[Index]*historyOp{}
	for _, op := range h.history.ops {
		if isClosed(op.p.done) && op.p.err == nil {
			answers[op.p.result.Index] = op
		}
	}
	reads := slices.Clone(h.history.reads)
	slices.SortStableFunc(reads, func(a, b historyRead) int { return cmp.Compare(a.index, b.index) })
	var fresh StateMachine = echo{}
	if h.options.machine != nil {
		fresh = h.options.machine(-1)
	}
	readsUpTo := func(i Index) {
		for len(reads) > 0 && reads[0].index <= i {
			r := reads[0]
			reads = reads[1:]
			if want := r.f(fresh); !bytes.Equal(r.result, want) {
				h.t.Errorf("a read on node %d at index %d returned %.80q, and %.80q when the log was applied again: the state depends on something else than the log", r.node, r.index, r.result, want)
			}
		}
	}
	for _, e := range log {
		readsUpTo(e.Index - 1)
		result := applyOne(fresh, e)
		if op := answers[e.Index]; op != nil && !bytes.Equal(op.p.result.Data, result) {
			h.t.Errorf("%.40q at index %d had the result %.80q on node %s, and %.80q when the log was applied again: Apply depends on something else than the log", e.Data, e.Index, op.p.result.Data, op.node, result)
		}
	}
	readsUpTo(^Index(0))
}

// applyOne applies an entry in whatever way the machine takes them.
func applyOne(m StateMachine, e Entry) []byte {
	results := make([][]byte, 1)
	switch m := m.(type) {
	case OnDisk:
		if err := m.ApplyOnDisk([]Entry{e}, results, func() []MetaChange { return nil }); err != nil {
			return []byte("error: " + err.Error())
		}
	case BatchApplier:
		m.ApplyBatch([]Entry{e}, results)
	default:
		return m.Apply(e)
	}
	return results[0]
}
