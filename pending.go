package raft

import (
	"errors"
	"slices"
)

// pending knows who waits for which entry and what each is told. It is pure:
// the applier and the simulator drive the same one. A proposal waits for the
// entry (index, term) it became. Once another entry is applied at that index,
// it can never be (State Machine Safety, §5.4.3), and neither can it once an
// entry of a later term is applied before it, because terms never go back along
// a log: the truthful answer is a rejection. The second rule matters where
// nobody proposes any more, so that its index may stay empty for ever.
type pending struct {
	groups  []pendingGroup
	waits   []*appliedWait // by ascending index
	gone    int            // how many of them were cancelled
	applied Index
	term    Term  // of entry applied
	stopped error // nothing is applied any more: what everybody is told

	// While proposals are at the leader their index is not known here, and the
	// entry may be applied before the leader's answer arrives.
	forwards  int
	kept      []keptResults
	keptBytes int
	maxKept   int
}

type pendingGroup struct {
	first     EntryID
	proposals []*Proposal
}

// appliedWait is somebody who waits until entry index is applied, or never will
// be here: then err says why, once done is closed.
type appliedWait struct {
	index   Index
	done    chan struct{}
	err     error
	waiting bool // it is in waits, and was not cancelled
}

type keptResults struct {
	entries Entries
	results outcomes
	bytes   int // of both
}

// outcomes is what a run of entries returned: one result for each, and what
// the sessions say about the entries that concern them.
type outcomes struct {
	data     [][]byte
	sessions []admission // by ascending place in the run
}

// of returns what the proposer of entry i of the run is told.
func (o *outcomes) of(i int, id EntryID) (Result, error) {
	k, found := slices.BinarySearchFunc(o.sessions, i, func(a admission, i int) int { return a.at - i })
	if found {
		return o.sessions[k].outcome(id)
	}
	return Result{Index: id.Index, Term: id.Term, Data: o.data[i]}, nil
}

// add registers proposals that became the entries from first on. It returns
// those that are settled already.
func (w *pending) add(first EntryID, ps []*Proposal) (settled []*Proposal, _ []chan struct{}) {
	if w.stopped != nil {
		for _, p := range ps {
			p.err = w.stopped
		}
		return ps, nil
	}
	n := 0
	if first.Index <= w.applied {
		n = int(min(Index(len(ps)), w.applied-first.Index+1))
		for i, p := range ps[:n] {
			w.lookup(EntryID{first.Index + Index(i), first.Term}, p)
			settled = append(settled, p)
		}
	}
	switch {
	case n == len(ps):
	case first.Term < w.term:
		settled = supersede(ps[n:], settled)
	default:
		w.groups = append(w.groups, pendingGroup{EntryID{first.Index + Index(n), first.Term}, ps[n:]})
	}
	return settled, nil
}

func supersede(ps []*Proposal, settled []*Proposal) []*Proposal {
	for _, p := range ps {
		p.err = ErrSuperseded
	}
	return append(settled, ps...)
}

// lookup settles a proposal whose entry was applied before anybody knew that
// it is this proposal's.
func (w *pending) lookup(id EntryID, p *Proposal) {
	for j := range w.kept {
		k := &w.kept[j]
		if id.Index < k.entries.First() || id.Index > k.entries.Last() {
			continue
		}
		i := int(id.Index - k.entries.First())
		answer(p, k.entries, i, id.Term, &k.results)
		return
	}
	p.err = outcomeUnknown(errResultDropped)
}

func answer(p *Proposal, e Entries, i int, term Term, results *outcomes) {
	id := EntryID{e.First() + Index(i), e.term(i)}
	if id.Term != term {
		p.err = ErrSuperseded
		return
	}
	p.result, p.err = results.of(i, id)
}

// onApplied settles whoever waits for these entries and returns the proposals
// and waits to wake. results.data has one element per entry.
func (w *pending) onApplied(e Entries, results outcomes, settled []*Proposal, woken []chan struct{}) ([]*Proposal, []chan struct{}) {
	w.applied, w.term = e.Last(), e.term(e.Len()-1)
	if w.forwards > 0 {
		w.keep(e, results)
	}
	settled = w.settle(settled, func(p *Proposal, id EntryID) {
		answer(p, e, int(id.Index-e.First()), id.Term, &results)
	})
	return settled, w.reached(woken)
}

// settle takes those whose entries are applied now, which tell answers, and
// those whose entries can't come any more.
func (w *pending) settle(settled []*Proposal, tell func(p *Proposal, id EntryID)) []*Proposal {
	groups := w.groups[:0]
	for _, g := range w.groups {
		n := 0
		for n < len(g.proposals) && g.first.Index+Index(n) <= w.applied {
			tell(g.proposals[n], EntryID{g.first.Index + Index(n), g.first.Term})
			n++
		}
		settled = append(settled, g.proposals[:n]...)
		switch {
		case n == len(g.proposals):
		case g.first.Term < w.term:
			settled = supersede(g.proposals[n:], settled)
		default:
			groups = append(groups, pendingGroup{EntryID{g.first.Index + Index(n), g.first.Term}, g.proposals[n:]})
		}
	}
	clear(w.groups[len(groups):])
	w.groups = groups
	return settled
}

// jump takes note that the state machine was restored from a snapshot that ends
// with last. Which of the proposals up to there took effect is not known here.
func (w *pending) jump(last EntryID) (settled []*Proposal, woken []chan struct{}) {
	w.applied, w.term = last.Index, last.Term
	settled = w.settle(nil, func(p *Proposal, _ EntryID) { p.err = outcomeUnknown(errRestored) })
	return settled, w.reached(nil)
}

// reached takes the waits for what is applied now.
func (w *pending) reached(woken []chan struct{}) []chan struct{} {
	n := 0
	for n < len(w.waits) && w.waits[n].index <= w.applied {
		if a := w.waits[n]; a.waiting {
			a.waiting = false
			woken = append(woken, a.done)
		} else {
			w.gone--
		}
		n++
	}
	w.waits = slices.Delete(w.waits, 0, n)
	return woken
}

func (w *pending) keep(e Entries, results outcomes) {
	n := e.size()
	for _, data := range results.data {
		n += len(data)
	}
	w.kept = append(w.kept, keptResults{e, results, n})
	w.keptBytes += n
	for w.keptBytes > w.maxKept && len(w.kept) > 1 {
		w.keptBytes -= w.kept[0].bytes
		w.kept = slices.Delete(w.kept, 0, 1)
	}
}

func (w *pending) forwardBegins() { w.forwards++ }

func (w *pending) forwardEnds() {
	if w.forwards--; w.forwards == 0 {
		w.kept, w.keptBytes = nil, 0
	}
}

// wait makes a's done close once entry a.index is applied, or never will be here.
func (w *pending) wait(a *appliedWait) {
	if a.index <= w.applied || w.stopped != nil {
		if a.index > w.applied {
			a.err = errors.Unwrap(w.stopped)
		}
		close(a.done)
		return
	}
	at, _ := slices.BinarySearchFunc(w.waits, a.index, func(a *appliedWait, i Index) int {
		if a.index <= i {
			return -1
		}
		return 1
	})
	a.waiting = true
	w.waits = slices.Insert(w.waits, at, a)
}

// cancel gives up a wait, if it still is one. All may be given up in the same
// moment, so waits is not gone through for each.
func (w *pending) cancel(a *appliedWait) {
	if !a.waiting {
		return
	}
	a.waiting = false
	if w.gone++; w.gone > len(w.waits)/2 {
		w.waits = slices.DeleteFunc(w.waits, func(b *appliedWait) bool { return !b.waiting })
		w.gone = 0
	}
}

// highest returns the highest index that anybody waits for, 0 if nobody does.
func (w *pending) highest() (i Index) {
	for k := len(w.waits) - 1; k >= 0 && i == 0; k-- {
		if w.waits[k].waiting {
			i = w.waits[k].index
		}
	}
	for _, g := range w.groups {
		i = max(i, g.first.Index+Index(len(g.proposals))-1)
	}
	return i
}

// stop settles everybody: nothing will be applied here any more. err says that
// outcomes are not known.
func (w *pending) stop(err error) (settled []*Proposal, woken []chan struct{}) {
	if w.stopped == nil {
		w.stopped = err
	}
	for _, g := range w.groups {
		for _, p := range g.proposals {
			p.err = err
			settled = append(settled, p)
		}
	}
	for _, a := range w.waits {
		if a.waiting {
			a.waiting, a.err = false, errors.Unwrap(w.stopped)
			woken = append(woken, a.done)
		}
	}
	w.groups, w.waits, w.gone, w.kept = nil, nil, 0, nil
	return settled, woken
}
