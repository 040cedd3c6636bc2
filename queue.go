package raft

import (
	"context"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
)

// Proposal is a command on its way. Its methods may be called from any goroutine.
type Proposal struct {
	state  atomic.Uint32
	done   chan struct{} // closed once result and err are set
	result Result
	err    error
}

const (
	proposalQueued    uint32 = iota // certainly not appended anywhere
	proposalTaken                   // it may be
	proposalAbandoned               // given up while queued: it never will be
)

// Wait returns the proposal's outcome, or an error once ctx ends. An error is
// a rejection, after which the command will never commit, or matches
// ErrOutcomeUnknown. Waiting again is allowed.
func (p *Proposal) Wait(ctx context.Context) (Result, error) {
	select {
	case <-p.done:
		return p.result, p.err
	default:
	}
	select {
	case <-p.done:
		return p.result, p.err
	case <-ctx.Done():
		return Result{}, outcomeUnknown(ctx.Err())
	}
}

// abandon takes a proposal back if nobody has taken it yet.
func (p *Proposal) abandon() bool {
	return p.state.CompareAndSwap(proposalQueued, proposalAbandoned)
}

func (p *Proposal) finish(err error) {
	p.err = err
	close(p.done)
}

// proposalQueue collects proposals, already encoded, until a step takes all of
// them at once. It has a lock of its own so that proposers do not wait for the core.
type proposalQueue struct {
	mu        sync.Mutex
	batch     proposalBatch
	maxBytes  int
	closed    error        // why nothing is accepted any more
	lastBytes int          // size of the batch taken last: the next one is likely as large
	bytes     atomic.Int64 // queued, encoded
}

// proposalBatch is proposals and their encoding, one entry each.
type proposalBatch struct {
	entries   entryBuilder
	proposals []*Proposal
}

// add copies cmd, and head, which stands before it. It returns a rejection if
// there is no room.
func (q *proposalQueue) add(kind entryKind, head, cmd []byte, p *Proposal) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed != nil {
		return q.closed
	}
	b := &q.batch
	if len(b.entries.buf)+len(head)+len(cmd) > q.maxBytes && len(b.proposals) > 0 {
		return ErrOverloaded
	}
	if b.entries.buf == nil {
		b.entries.buf = make([]byte, 0, q.lastBytes+len(head)+len(cmd)+entryHeaderBytes)
	}
	b.entries.add(kind, head, cmd)
	b.proposals = append(b.proposals, p)
	q.bytes.Store(int64(len(b.entries.buf)))
	return nil
}

// next returns the size of the oldest proposal, encoded, 0 if there is none.
func (q *proposalQueue) next() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.batch.proposals) == 0 {
		return 0
	}
	return q.batch.entries.end(0)
}

// take removes what is queued and was not abandoned: the oldest proposals, up to
// maxBytes encoded but at least one.
func (q *proposalQueue) take(maxBytes int) proposalBatch {
	q.mu.Lock()
	defer q.mu.Unlock()
	b, rest := q.batch.split(maxBytes)
	q.lastBytes = min(len(b.entries.buf), 1<<20)
	q.batch = rest
	q.bytes.Store(int64(len(rest.entries.buf)))
	return b.taken()
}

// split returns the longest prefix of at most maxBytes, but at least one
// proposal, and a copy of what is left.
func (b proposalBatch) split(maxBytes int) (first, rest proposalBatch) {
	if len(b.entries.buf) <= maxBytes || len(b.proposals) < 2 {
		return b, rest
	}
	n := sort.Search(len(b.proposals), func(i int) bool { return i > 0 && b.entries.end(i) > maxBytes })
	n = max(n, 1)
	if n == len(b.proposals) {
		return b, rest
	}
	cut := int(b.entries.offs[n])
	rest.proposals = slices.Clone(b.proposals[n:])
	rest.entries.buf = slices.Clone(b.entries.buf[cut:])
	for _, off := range b.entries.offs[n:] {
		rest.entries.offs = append(rest.entries.offs, off-uint32(cut))
	}
	b.proposals, b.entries.offs = b.proposals[:n:n], b.entries.offs[:n:n]
	b.entries.buf = b.entries.buf[:cut:cut]
	return b, rest
}

// taken marks all proposals as taken and leaves out those that were abandoned.
func (b proposalBatch) taken() proposalBatch {
	abandoned := 0
	for i, p := range b.proposals {
		if !p.state.CompareAndSwap(proposalQueued, proposalTaken) {
			b.proposals[i] = nil
			abandoned++
		}
	}
	if abandoned == 0 {
		return b
	}
	var kept proposalBatch
	for i, p := range b.proposals {
		if p == nil {
			continue
		}
		end := b.entries.end(i)
		kept.entries.offs = append(kept.entries.offs, uint32(len(kept.entries.buf)))
		kept.entries.buf = append(kept.entries.buf, b.entries.buf[b.entries.offs[i]:end]...)
		kept.proposals = append(kept.proposals, p)
	}
	return kept
}

// finish answers every proposal with err.
func (b proposalBatch) finish(err error) {
	for _, p := range b.proposals {
		p.finish(err)
	}
}

// putBack returns a batch that certainly was appended nowhere to the front.
func (q *proposalQueue) putBack(b proposalBatch) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed != nil {
		return q.closed
	}
	for _, p := range b.proposals {
		p.state.Store(proposalQueued)
	}
	behind := q.batch
	shift := uint32(len(b.entries.buf))
	b.entries.buf = append(b.entries.buf, behind.entries.buf...)
	for _, off := range behind.entries.offs {
		b.entries.offs = append(b.entries.offs, off+shift)
	}
	b.proposals = append(b.proposals, behind.proposals...)
	q.batch = b
	q.bytes.Store(int64(len(b.entries.buf)))
	return nil
}

// close rejects everything queued, now and later, with err.
func (q *proposalQueue) close(err error) (rejected []*Proposal) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = err
	rejected = q.batch.taken().proposals
	q.batch = proposalBatch{}
	q.bytes.Store(0)
	return rejected
}
