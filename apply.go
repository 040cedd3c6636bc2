package raft

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"time"
)

const (
	applyBatchBytes = 1 << 20 // of entries taken per round, so that waiters are told in time
)

// applier is the goroutine that feeds the state machine, and what it needs.
type applier struct {
	cm      *ConsensusModule
	machine StateMachine
	batch   BatchApplier    // machine, if it is one
	disk    OnDisk          // machine, if it is one
	ctx     context.Context // ends with the node
	read    []Entries       // taken from the log, not yet applied

	retry    <-chan time.Time // a snapshot that failed is due again; nil: none is
	policy   snapshotPolicy
	lastTime time.Time     // of the newest entry applied
	config   configAt      // the newest applied
	sessions *sessionTable // as of the newest applied

	portion portion // scratch
	settled []*Proposal
	woken   []chan struct{}
}

func newApplier(ctx context.Context, cm *ConsensusModule, conf *Config) *applier {
	b, _ := conf.StateMachine.(BatchApplier)
	d, _ := conf.StateMachine.(OnDisk)
	return &applier{
		cm: cm, ctx: ctx, machine: conf.StateMachine, batch: b, disk: d, sessions: newSessionTable(),
		policy: snapshotPolicy{
			everyBytes: int64(conf.SnapshotEveryBytes), everyEntries: int64(conf.SnapshotEveryEntries), keepBytes: int64(conf.KeepLogBytes),
		},
	}
}

// run applies committed entries in order until the node stops.
func (a *applier) run() {
	cm := a.cm
	for {
		select {
		case <-cm.done:
			return
		default:
		}
		a.capture()
		if last, needed := a.replaced(); needed {
			if err := a.restore(last); err != nil {
				a.stop(last.Index, err)
				return
			}
			continue
		}
		run, ok := a.next()
		if !ok {
			select {
			case <-cm.applyWake:
			case <-a.retry:
				a.retry = nil
			case <-cm.done:
				return
			}
			continue
		}
		results, err := a.apply(run)
		if err != nil {
			a.stop(err.(*ApplyError).Index, err)
			return
		}
		a.tell(run, results)
		a.note(run)
	}
}

// replaced returns the end of the snapshot that has replaced the log, if the
// state machine must be restored from it before anything else can be applied.
func (a *applier) replaced() (EntryID, bool) {
	cm := a.cm
	cm.mu.Lock()
	defer cm.unlock()
	return cm.core.newestSnapshot, cm.core.log.start.Index > cm.pending.applied && cm.core.role != Dead
}

// note remembers what a snapshot after this run says of the log.
func (a *applier) note(run Entries) {
	a.policy.applied(run)
	a.lastTime, a.config = lastTimeOf(run), a.configAfter(run)
}

func (a *applier) configAfter(run Entries) configAt {
	for i := run.Len() - 1; i >= 0; i-- {
		if run.kind(i) == entryConfiguration {
			return configAt{run.First() + Index(i), slices.Clone(run.data(i))}
		}
	}
	return a.config
}

// metaAfter says what the state includes once run is applied.
func (a *applier) metaAfter(run Entries) *SnapshotMeta {
	conf := a.configAfter(run)
	last := run.Len() - 1
	return &SnapshotMeta{Last: EntryID{run.Last(), run.term(last)}, Time: lastTimeOf(run), ConfigIndex: conf.index, Config: conf.data}
}

// next returns the next run of committed entries, from memory or from storage.
func (a *applier) next() (Entries, bool) {
	if len(a.read) > 0 {
		run := a.read[0]
		a.read = a.read[1:]
		return run, true
	}
	cm := a.cm
	cm.mu.Lock()
	lo, hi := cm.pending.applied+1, cm.applicable()
	if lo > hi || lo <= cm.core.log.start.Index || cm.core.role == Dead {
		cm.unlock()
		return Entries{}, false
	}
	runs, inMemory := cm.core.log.from(lo, hi, applyBatchBytes)
	if !inMemory {
		hi = min(hi, cm.core.log.firstInMemory()-1)
		cm.diskUsers.add()
	}
	cm.core.applyBegins(time.Now())
	cm.unlock()
	if !inMemory {
		var err error
		runs, err = cm.storage.Read(lo, hi, applyBatchBytes)
		cm.leaveDisk()
		if err != nil {
			cm.step(func(c *core) {
				c.applyEnds(lo - 1)
				if c.log.start.Index < lo { // otherwise a snapshot replaced it meanwhile
					c.die(fmt.Errorf("raft: read entry %d to apply it: %w", lo, err))
				}
			})
			return Entries{}, false
		}
	}
	a.read = runs[1:]
	return runs[0], true
}

// apply gives the commands of a run to the state machine, except for those
// that a session has had executed before. The error is an *ApplyError: it
// panicked, or its ApplyOnDisk failed.
func (a *applier) apply(run Entries) (results outcomes, err error) {
	results.data = make([][]byte, run.Len())
	defer a.cm.applying.Store(0)
	current := run.First()
	defer func() {
		if v := recover(); v != nil {
			err = &ApplyError{Index: current, Value: v, Stack: string(debug.Stack())}
		}
	}()
	p := &a.portion
	defer func() { clear(p.commands) }()
	for from := 0; from < run.Len() && !isClosed(a.cm.done); from = p.to {
		a.sessions.plan(run, from, p)
		current = run.First() + Index(from)
		if err := a.execute(p, results.data, &current); err != nil {
			return results, &ApplyError{Index: current, Value: err}
		}
		results.sessions = append(results.sessions, p.sessions...)
	}
	return results, nil
}

// execute gives a portion to the state machine, in the way that it takes
// entries, and what it returns to the sessions. current is the entry that is
// being executed, or the first of those that are.
func (a *applier) execute(p *portion, results [][]byte, current *Index) error {
	a.cm.applying.Store(uint64(*current))
	switch {
	case len(p.commands) == 0:
	case a.disk != nil:
		return a.applyOnDisk(p, results)
	case a.batch != nil:
		out := p.results(results)
		a.batch.ApplyBatch(p.commands, out)
		p.returned(out, results)
	default:
		for k, e := range p.commands {
			if isClosed(a.cm.done) {
				return nil // Close says that no further call follows the one that runs; tell sees it too
			}
			*current = e.Index
			a.cm.applying.Store(uint64(e.Index))
			results[p.at[k]] = a.machine.Apply(e)
		}
	}
	a.sessions.executed(p, results)
	return nil
}

// applyOnDisk has a portion executed and, in the same transaction, stored what
// that changes in the library's table. The results of sessions are part of it,
// so it is made when they are there.
func (a *applier) applyOnDisk(p *portion, results [][]byte) error {
	out := p.results(results)
	var changes []MetaChange
	err := a.disk.ApplyOnDisk(p.commands, out, func() []MetaChange {
		if changes == nil {
			p.returned(out, results)
			a.sessions.executed(p, results)
			changes = a.sessions.changes(a.metaAfter(p.run.slice(0, p.to)), p.sessions)
		}
		return changes
	})
	if err == nil && changes == nil {
		err = errMetaNotStored
	}
	return err
}

// results returns where the state machine puts the results of a portion's
// commands: where they belong, if there is one for each entry.
func (p *portion) results(all [][]byte) [][]byte {
	if len(p.commands) == len(all) {
		return all
	}
	return make([][]byte, len(p.commands))
}

// returned puts the results of commands in their places among all of the run.
func (p *portion) returned(out, all [][]byte) {
	if len(out) < len(all) {
		for k, i := range p.at {
			all[i] = out[k]
		}
	}
}

// tell wakes everybody who waited for this run.
func (a *applier) tell(run Entries, results outcomes) {
	cm := a.cm
	cm.mu.Lock()
	if cm.core.role != Dead { // otherwise die has told them
		a.settled, a.woken = cm.pending.onApplied(run, results, a.settled[:0], a.woken[:0])
		cm.sessions = len(a.sessions.byID)
		cm.core.applyEnds(run.Last())
		if len(a.read) > 0 {
			cm.core.applyBegins(time.Now())
		}
		if cm.core.role == Leader && cm.core.firstOfTerm <= run.Last() {
			cm.leadership.begin()
		}
	}
	cm.unlock()
	settle(a.settled, a.woken)
	a.settled, a.woken = a.settled[:0], a.woken[:0]
}

// stop is the end of applying on this node: the entry is never skipped. Who
// waits here is told; the node goes on replicating and voting.
func (a *applier) stop(index Index, err error) {
	cm := a.cm
	cm.mu.Lock()
	cm.transition(func(c *core) { c.stopApplying(index, err) })
	ps, waits := cm.pending.stop(outcomeUnknown(err))
	rejection := fmt.Errorf("%w applying: %w", ErrStopped, err)
	rejected := cm.queue.close(rejection)
	snapshots := cm.captures.waiting
	cm.captures.waiting = nil
	cm.unlock()
	settle(ps, waits)
	answerAll(snapshots, rejection)
	for _, p := range rejected {
		p.finish(rejection)
	}
}
