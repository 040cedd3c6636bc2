package raft

import (
	"container/list"
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
	place  *list.Element // among those that wait for room; nil: it does not. Guarded by the queue's lock
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
	front     proposalBatch // was put back: goes before batch
	batch     proposalBatch
	waiting   list.List // of waitingProposal: callers that wait for room, in the order in which they came
	maxBytes  int
	closed    error        // why nothing is accepted any more
	lastBytes int          // size of the batch taken last: the next one is likely as large
	bytes     atomic.Int64 // queued, encoded
}

// proposalBatch is proposals and their encoding, one entry each.
type proposalBatch struct {
	entries   entryBuilder
	proposals []*Proposal
	isRest    bool // earlier ones were split off: its buffer is the end of a larger one
}

// waitingProposal is one that found no room. Its caller waits with it, so that
// head and cmd stay what they are; withdraw ends that.
type waitingProposal struct {
	kind      entryKind
	head, cmd []byte
	p         *Proposal
}

// maxWaiting is how many callers may wait for room in the queue.
const maxWaiting = 1 << 16

// add copies cmd, and head, which stands before it. If there is no room, or others
// wait for some already, a caller that waits gets its place behind them, and any
// other a rejection: whoever comes again and again must not get the room for
// which somebody waits.
func (q *proposalQueue) add(kind entryKind, head, cmd []byte, p *Proposal, waits bool) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	w := waitingProposal{kind, head, cmd, p}
	switch {
	case q.closed != nil:
		return q.closed
	case q.waiting.Len() == 0 && q.fits(w):
		q.put(w)
	case waits && q.waiting.Len() < maxWaiting:
		p.place = q.waiting.PushBack(w)
	default:
		return ErrOverloaded
	}
	return nil
}

// fits tells whether there is room: an empty queue has room for anything. mu is held.
func (q *proposalQueue) fits(w waitingProposal) bool {
	n := q.size()
	return n == 0 || n+len(w.head)+len(w.cmd) <= q.maxBytes
}

// size returns how many bytes are queued, encoded. mu is held.
func (q *proposalQueue) size() int { return len(q.front.entries.buf) + len(q.batch.entries.buf) }

// oldest returns what is taken next. mu is held.
func (q *proposalQueue) oldest() *proposalBatch {
	if len(q.front.proposals) > 0 {
		return &q.front
	}
	return &q.batch
}

// admit gives room to those that wait for it, in turn. mu is held.
func (q *proposalQueue) admit() {
	for first := q.waiting.Front(); first != nil; first = q.waiting.Front() {
		w := first.Value.(waitingProposal)
		if !q.fits(w) {
			return
		}
		q.leave(w.p)
		q.put(w)
	}
}

// leave ends a wait for room. It costs the same however many wait: all of them
// may give up at once. mu is held.
func (q *proposalQueue) leave(p *Proposal) {
	q.waiting.Remove(p.place)
	p.place = nil
}

// withdraw takes a proposal back that still waits for room.
func (q *proposalQueue) withdraw(p *Proposal) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if p.place == nil {
		return false
	}
	q.leave(p)
	q.admit() // it may have been the one that was too large
	return true
}

func (q *proposalQueue) put(w waitingProposal) {
	b, head, cmd := &q.batch, w.head, w.cmd
	if b.entries.buf == nil {
		b.entries.buf = make([]byte, 0, q.lastBytes+len(head)+len(cmd)+entryHeaderBytes)
	}
	b.entries.add(w.kind, head, cmd)
	b.proposals = append(b.proposals, w.p)
	q.bytes.Store(int64(q.size()))
}

// next returns the size of the oldest proposal, encoded, 0 if there is none.
func (q *proposalQueue) next() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := q.oldest()
	if len(b.proposals) == 0 {
		return 0
	}
	return b.entries.end(0)
}

// take removes what is queued and was not abandoned: the oldest proposals, up to
// maxBytes encoded but at least one. What was put back is taken alone.
func (q *proposalQueue) take(maxBytes int) proposalBatch {
	q.mu.Lock()
	defer q.mu.Unlock()
	from := q.oldest()
	b, rest := from.split(maxBytes)
	q.lastBytes = min(len(b.entries.buf), 1<<20)
	*from = rest
	q.bytes.Store(int64(q.size()))
	q.admit()
	return b.taken()
}

// split returns the longest prefix of at most maxBytes, but at least one
// proposal, and what is left. The prefix is a copy, so that the log, which holds
// on to it, does not hold on to the buffer of all.
func (b proposalBatch) split(maxBytes int) (first, rest proposalBatch) {
	n := len(b.proposals)
	if len(b.entries.buf) > maxBytes {
		n = sort.Search(n, func(i int) bool { return i > 0 && b.entries.end(i) > maxBytes })
		n = max(n, min(1, len(b.proposals)))
	}
	if n == len(b.proposals) {
		if b.isRest {
			b.entries.buf = slices.Clone(b.entries.buf)
		}
		return b, rest
	}
	cut := b.entries.offs[n]
	first.proposals = slices.Clone(b.proposals[:n])
	first.entries.offs = slices.Clone(b.entries.offs[:n])
	first.entries.buf = slices.Clone(b.entries.buf[:cut])
	clear(b.proposals[:n])
	rest = proposalBatch{entryBuilder{buf: b.entries.buf[cut:], offs: b.entries.offs[n:]}, b.proposals[n:], true}
	for i := range rest.entries.offs {
		rest.entries.offs[i] -= cut
	}
	return first, rest
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

// putBack returns a batch that certainly was appended nowhere to the front. It
// costs what was put back, however much is queued behind that.
func (q *proposalQueue) putBack(b proposalBatch) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed != nil {
		return q.closed
	}
	for _, p := range b.proposals {
		p.state.Store(proposalQueued)
	}
	behind := q.front
	shift := uint32(len(b.entries.buf))
	b.entries.buf = append(b.entries.buf, behind.entries.buf...)
	for _, off := range behind.entries.offs {
		b.entries.offs = append(b.entries.offs, off+shift)
	}
	b.proposals = append(b.proposals, behind.proposals...)
	q.front = b
	q.bytes.Store(int64(q.size()))
	return nil
}

// close rejects everything queued, now and later, with err.
func (q *proposalQueue) close(err error) (rejected []*Proposal) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = err
	rejected = append(q.front.taken().proposals, q.batch.taken().proposals...)
	for first := q.waiting.Front(); first != nil; first = q.waiting.Front() {
		p := first.Value.(waitingProposal).p
		q.leave(p)
		rejected = append(rejected, p)
	}
	q.front, q.batch = proposalBatch{}, proposalBatch{}
	q.bytes.Store(0)
	return rejected
}
