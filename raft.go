package raft

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// NodeID is a node's name, chosen by its operator.
type NodeID string

// Term is a leader's term of office (§5.1), and a fencing token: a later
// leader has a higher one.
type Term uint64

// Index is a position in the log. The first entry has 1; 0 is before the log.
type Index uint64

// Entry is one committed command. No-ops and membership changes are entries
// too but are not given to the state machine, so indexes have gaps.
type Entry struct {
	Index Index
	Term  Term
	Time  time.Time // stamped by the leader, never decreasing along the log
	Data  []byte    // immutable; may be kept, but a kept slice pins its frame
}

// Result is a committed proposal's place in the log and what Apply returned for it.
type Result struct {
	Index Index
	Term  Term
	Data  []byte
}

// ConsensusModule holds a server's term, vote and log (Figure 1 of the paper)
// and runs the goroutines that step them. The rules themselves are core's.
// Everything below mu is guarded by it; it is held to compute, never across a wait.
type ConsensusModule struct {
	storage   Storage
	space     spacious // storage, nil if its space does not run out
	queue     proposalQueue
	reads     readQueue
	events    *eventLog
	transport transport

	mu            sync.Mutex
	core          *core
	outbox        outbox
	pending       pending
	heartbeatDone chan struct{} // open exactly while leading; closing it stops the heartbeat goroutine
	timerArmed    time.Time     // when the timer goroutine will wake by itself
	applySeen     Index         // the highest entry of which the applier was told
	sessions      int           // open ones, as of pending.applied
	onDisk        bool          // the state machine must not be ahead of the log on disk
	captures      captures
	incoming      incomingSnapshot // has its own lock
	stateSeen     visibleState
	changed       chan struct{} // closed and renewed when stateSeen changes
	leadership    leadership
	released      []message  // scratch
	starved       bool       // proposals wait for the disk to make room
	flushesItself bool       // whoever steps now flushes next: the flusher may sleep on
	sleptFor      sleepClock // nil where no lease is asked for

	stepAt     atomic.Int64 // a step takes queued proposals once they have this many bytes
	flushing   atomic.Int32 // writes or fsyncs that run
	applying   atomic.Uint64
	writing    atomic.Int32 // snapshots that are written or received
	lastFlush  atomic.Int64 // unix nanoseconds
	sealDue    atomic.Bool  // sealTimer runs
	sealTimer  *time.Timer
	staged     atomic.Uint64 // position of the newest save
	flushed    atomic.Uint64 // position that a flush has reached
	flushWake  chan struct{}
	timerWake  chan struct{}
	applyWake  chan struct{}
	done       chan struct{} // closed when the core is dead: every goroutine ends
	goroutines group         // all of them
	diskUsers  group         // those that may call storage
}

// transport takes what the core wants sent. Its methods never block.
type transport interface {
	send(m message)             // a request
	hangup(to memberID)         // close the append connection
	leads(leader memberID)      // which is another one than before
	read(q entryRequest)        // read entries and step entriesRead
	snapshot(q snapshotRequest) // send the newest snapshot and step snapshotSent
	canForward(to memberID) bool
	forward(to memberID, b proposalBatch) // proposals, to the leader
	ask(to memberID, lease bool) bool     // the leader for the index of reads, and call readsAnswered
	stopped()                             // the core is dead
}

// inbound is a request that waits for its reply; message.token holds one.
type inbound interface{ reply(m message) }

func newConsensusModule(s Storage, c *core, conf *Config, events *eventLog) *ConsensusModule {
	cm := &ConsensusModule{
		storage:   s,
		core:      c,
		events:    events,
		sealTimer: time.NewTimer(time.Hour),
		flushWake: make(chan struct{}, 1),
		timerWake: make(chan struct{}, 1),
		applyWake: make(chan struct{}, 1),
		done:      make(chan struct{}),
	}
	if conf.LeaseDuration > 0 {
		cm.sleptFor = conf.sleptFor
	}
	cm.queue.maxBytes = conf.MaxQueueBytes
	cm.reads.init(cm)
	cm.pending.maxKept = conf.MaxQueueBytes
	cm.space, _ = s.(spacious)
	cm.pending.applied, cm.pending.term = c.newestSnapshot.Index, c.newestSnapshot.Term
	_, cm.onDisk = conf.StateMachine.(OnDisk)
	cm.leadership.changed = make(chan struct{})
	cm.changed = make(chan struct{})
	return cm
}

// newDice returns the source of one node's random deadlines.
func newDice() *rand.Rand { return rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())) }

// run starts the goroutines that every node has.
func (cm *ConsensusModule) run(t transport, a *applier) {
	cm.mu.Lock()
	defer cm.unlock()
	cm.transport = t
	cm.start(cm.runTimer)
	cm.start(a.run)
	cm.diskUsers.add()
	cm.start(cm.runFlusher)
	cm.transition(func(*core) {})
}

// start starts a goroutine of this node, unless it is stopping. mu is held:
// becoming Dead happens under it too, so none starts after Close began to wait.
func (cm *ConsensusModule) start(f func()) bool {
	if cm.core.role == Dead {
		return false
	}
	cm.goroutines.add()
	go func() {
		defer cm.goroutines.leave()
		f()
	}()
	return true
}

// step is the only way in: one transition on core, its effects handed over,
// nothing waited for.
func (cm *ConsensusModule) step(f func(c *core)) {
	cm.mu.Lock()
	cm.transition(f)
	cm.unlock()
}

// stepThenFlush is step for a caller that calls flush right after it.
func (cm *ConsensusModule) stepThenFlush(f func(c *core)) {
	cm.mu.Lock()
	cm.flushesItself = true
	cm.transition(f)
	cm.flushesItself = false
	cm.unlock()
}

// tryStep makes the core take what is queued, unless somebody holds the lock:
// whoever does looks at the queues after letting go.
func (cm *ConsensusModule) tryStep() {
	if cm.queueReady() && cm.mu.TryLock() {
		cm.transition(func(*core) {})
		cm.unlock()
	}
}

// queueReady tells whether a step would take proposals or reads that are queued.
func (cm *ConsensusModule) queueReady() bool {
	n := cm.queue.bytes.Load()
	return n > 0 && n >= cm.stepAt.Load() || cm.reads.ready()
}

// unlock releases mu and looks once more for what was queued while it was held.
func (cm *ConsensusModule) unlock() {
	dead := cm.core.role == Dead
	cm.mu.Unlock()
	cm.events.log()
	for !dead && cm.queueReady() && cm.mu.TryLock() {
		cm.transition(func(*core) {})
		dead = cm.core.role == Dead
		cm.mu.Unlock()
	}
}

// transition runs f and whatever proposals and reads are queued as one transition.
func (cm *ConsensusModule) transition(f func(c *core)) {
	c := cm.core
	var before coreSnapshot
	if raceEnabled {
		before = c.snapshot()
	}
	wasDead := c.role == Dead
	cm.lookAtClock()
	f(c)
	cm.takeProposals()
	cm.takeReads()
	out := c.finish()
	if raceEnabled {
		if err := c.checkStep(before); err != nil {
			panic(err)
		}
		if c.role != Dead && cm.pending.applied > c.commitIndex {
			panic(invariantError("applied up to %d, and committed up to %d", cm.pending.applied, c.commitIndex))
		}
	}
	cm.handOver(&out)
	if c.role == Dead && !wasDead {
		cm.die()
	}
}

func (cm *ConsensusModule) lookAtClock() {
	cm.core.now = time.Now()
	if cm.sleptFor != nil {
		cm.core.slept, _ = cm.sleptFor() // after an error no lease is believed in
	}
}

// Thresholds of stepAt, in bytes of queued proposals.
const (
	takeNow      = 0
	takeGathered = 256 << 10
	takeNever    = 1 << 62
)

// takeProposals gives queued proposals to the core if it leads, or to the leader.
func (cm *ConsensusModule) takeProposals() {
	c := cm.core
	threshold := cm.threshold()
	if n := cm.queue.bytes.Load(); n > 0 && n >= threshold {
		limit := c.limits.maxFrameBytes // heartbeats must not queue behind a large forward
		if c.role == Leader {
			limit = min(cm.roomFor(cm.queue.next()), max(limit, c.limits.maxUncommittedSize-c.unsettledBytes()))
		}
		if limit == 0 {
			return
		}
		b := cm.queue.take(limit)
		switch {
		case len(b.proposals) == 0: // all were given up
		case c.outOfSpace():
			b.finish(ErrDiskFull)
		case c.role != Leader:
			cm.pending.forwardBegins()
			cm.transport.forward(c.forwardTo, b)
		default:
			first, _ := c.propose(&b.entries)
			settle(cm.pending.add(first, b.proposals))
		}
	}
}

// room returns how many bytes of entries the disk has space for.
func (cm *ConsensusModule) room() int64 {
	if cm.space == nil {
		return noLimit
	}
	n, _ := cm.space.Room()
	return n
}

// roomFor returns how many bytes of proposals a leader may take, of which the
// first has n: 0 if the disk has no space for that one yet. It is asked for some
// then, and proposals wait.
func (cm *ConsensusModule) roomFor(n int) int {
	room := cm.room() - saveOverhead
	if room < int64(n) && !cm.core.outOfSpace() {
		cm.starved = true
		cm.space.Want(int64(n) + saveOverhead)
		return 0
	}
	return int(min(max(room, int64(n)), math.MaxInt32))
}

// noteSpace tells the core whether the disk is full, and proposals that waited
// for it to make room that there may be some. mu is held.
func (cm *ConsensusModule) noteSpace() {
	if cm.space == nil {
		return
	}
	if _, full := cm.space.Room(); cm.starved || (full == nil) != (cm.core.full == nil) {
		if (full == nil) != (cm.core.full == nil) {
			cm.captures.forSpace, cm.captures.retryAt = full != nil, time.Time{}
			wake(cm.applyWake)
		}
		cm.starved = false
		cm.transition(func(c *core) { c.diskSpace(full) })
	}
}

// threshold says from how many queued bytes on a step takes proposals. While
// the own disk is busy with earlier ones, more are left to gather: they will
// share one write, and frames to followers that start together with it.
func (cm *ConsensusModule) threshold() int64 {
	c := cm.core
	switch {
	case c.outOfSpace():
		return takeNow // to refuse them
	case c.role == Leader && (cm.starved || !c.hasRoom()):
		return takeNever
	case c.role == Leader && c.lsn == c.durableLSN:
		return takeNow
	case c.role == Leader:
		return takeGathered
	case c.role == Follower && c.forwardTo != 0 && !c.applyFailed && cm.transport.canForward(c.forwardTo):
		return takeNow
	}
	return takeNever
}

// handOver passes the effects of a transition on, in an order that matters:
// what must be durable reaches storage before messages that depend on it.
func (cm *ConsensusModule) handOver(out *effects) {
	c := cm.core
	if out.save != nil {
		cm.storage.Append(*out.save)
		cm.staged.Store(uint64(out.save.LSN))
		if !cm.flushesItself {
			wake(cm.flushWake)
		}
	}
	if t := cm.threshold(); t != cm.stepAt.Load() {
		cm.stepAt.Store(t)
	}
	cm.reads.openFor(cm.readsOpen())
	for _, to := range out.hangups {
		cm.transport.hangup(to) // first: what this step sends there belongs on the next connection
	}
	cm.outbox.add(out.msgs)
	cm.released = cm.outbox.release(cm.released[:0], c.durableLSN, c.currentTerm, c.hardLSN)
	for i, m := range cm.released {
		if m.token != nil {
			m.token.(inbound).reply(m)
		} else {
			cm.transport.send(m)
		}
		cm.released[i] = message{}
	}
	for _, q := range out.reads {
		cm.transport.read(q)
	}
	for _, a := range out.answers {
		a.token.(readAnswerer).answer(a)
	}
	for _, q := range out.snapshots {
		cm.transport.snapshot(q)
	}
	cm.events.add(out.events)
	cm.runLeadership()
	if now := c.visible(); now != cm.stateSeen {
		if now.leader != 0 && now.leader != cm.stateSeen.leader {
			cm.transport.leads(now.leader)
		}
		cm.stateSeen = now
		close(cm.changed)
		cm.changed = make(chan struct{})
	}
	if i := cm.applicable(); i > cm.applySeen {
		cm.applySeen = i
		wake(cm.applyWake)
	}
	if c.electionDeadline.Before(cm.timerArmed) {
		wake(cm.timerWake)
	}
}

// applicable returns the highest entry that may be applied.
func (cm *ConsensusModule) applicable() Index {
	if cm.onDisk {
		return min(cm.core.commitIndex, cm.core.durableIndex)
	}
	return cm.core.commitIndex
}

// visibleState is what somebody may wait to see changed.
type visibleState struct {
	role           Role
	term           Term
	leader         memberID
	transfer       memberID
	members        Index // entry of the newest configuration
	membersSettled bool  // it is committed
}

func (c *core) visible() visibleState {
	newest := c.configs[len(c.configs)-1].index
	return visibleState{c.role, c.currentTerm, c.leader, c.transfer.to, newest, newest <= c.commitIndex}
}

// runLeadership starts and stops the heartbeat goroutine with the role, and
// ends the contexts of a leadership that is over.
func (cm *ConsensusModule) runLeadership() {
	c := cm.core
	if cm.heartbeatDone != nil && (c.role != Leader || cm.leadership.term != c.currentTerm) {
		close(cm.heartbeatDone)
		cm.heartbeatDone = nil
		cm.leadership.end()
	}
	if cm.heartbeatDone == nil && c.role == Leader {
		done := make(chan struct{})
		cm.heartbeatDone = done
		cm.leadership.term = c.currentTerm
		cm.start(func() { cm.runHeartbeats(done) })
	}
	if c.role == Leader && cm.pending.applied >= c.firstOfTerm {
		cm.leadership.begin()
	}
}

// die is what a dead core leaves to do: settle everybody who waits and end
// every goroutine. It runs in the step that died, once.
func (cm *ConsensusModule) die() {
	why := ErrStopped
	for _, p := range cm.queue.close(why) {
		p.finish(why)
	}
	settle(cm.pending.stop(outcomeUnknown(why)))
	cm.outbox.drop()
	close(cm.done)
	cm.transport.stopped()
}

// fail ends the node because err leaves no safe way to go on.
func (cm *ConsensusModule) fail(err error) {
	cm.step(func(c *core) { c.die(err) })
}

// flush makes everything staged durable and steps with the position reached.
// A failure is final: the node stops acknowledging at once. Only on a full disk
// what is staged stays so, and the flusher tries again when there is space.
func (cm *ConsensusModule) flush() error {
	began := time.Now()
	cm.flushing.Add(1)
	lsn, err := cm.storage.Flush()
	cm.flushing.Add(-1)
	if errors.Is(err, ErrDiskFull) {
		cm.mu.Lock()
		cm.noteSpace()
		cm.unlock()
		return err
	}
	if err != nil {
		cm.fail(err)
		return err
	}
	took := time.Since(began)
	cm.lastFlush.Store(time.Now().UnixNano())
	if !cm.sealDue.Swap(true) {
		cm.sealTimer.Reset(sealAfter)
	}
	for old := cm.flushed.Load(); old < uint64(lsn) && !cm.flushed.CompareAndSwap(old, uint64(lsn)); {
		old = cm.flushed.Load()
	}
	cm.step(func(c *core) { c.persisted(lsn, took) })
	return nil
}

// leaveDisk ends a goroutine's use of storage. The flusher uses it until the
// node is dead, and nobody begins to after that, so whoever leaves last closes
// it: a call that hangs keeps its own goroutine, and no other that waits for it.
func (cm *ConsensusModule) leaveDisk() {
	if cm.diskUsers.leave() {
		cm.flushing.Add(1)
		cm.incoming.abort(math.MaxInt64)
		cm.storage.Close()
		cm.flushing.Add(-1)
	}
}

// unflushed tells whether something is staged that no flush has reached.
func (cm *ConsensusModule) unflushed() bool { return cm.staged.Load() > cm.flushed.Load() }

// runFlusher makes staged saves durable, for every step whose goroutine does
// not do it itself.
func (cm *ConsensusModule) runFlusher() {
	defer cm.leaveDisk()
	for {
		select {
		case <-cm.flushWake:
			cm.mu.Lock()
			cm.noteSpace()
			staged := cm.core.lsn > cm.core.durableLSN
			cm.unlock()
			if staged {
				if err := cm.flush(); err != nil && !errors.Is(err, ErrDiskFull) {
					<-cm.done
				}
			}
		case <-cm.sealTimer.C:
			cm.seal()
		case <-cm.done:
			cm.sealTimer.Stop()
			return
		}
	}
}

// sealer is a Storage that can prove its newest write, so that damage to it
// can later be told from a crash. Sealing costs a sync, so it waits for a lull.
type sealer interface{ Seal() error }

const sealAfter = 100 * time.Millisecond

func (cm *ConsensusModule) seal() {
	idle := time.Since(time.Unix(0, cm.lastFlush.Load()))
	if idle < sealAfter {
		cm.sealTimer.Reset(sealAfter - idle)
		return
	}
	cm.sealDue.Store(false)
	s, ok := cm.storage.(sealer)
	if !ok {
		return
	}
	cm.flushing.Add(1)
	err := s.Seal()
	cm.flushing.Add(-1)
	if err != nil {
		cm.fail(err)
	}
}

// runTimer steps the core when its election deadline has passed. Deadlines
// mostly move later, so it sleeps on until the one it knew has come.
func (cm *ConsensusModule) runTimer() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		cm.mu.Lock()
		if !cm.core.electionDeadline.IsZero() && !cm.core.electionDeadline.After(time.Now()) {
			cm.transition((*core).tick)
		}
		wait := time.Hour
		if !cm.core.electionDeadline.IsZero() {
			wait = time.Until(cm.core.electionDeadline)
		}
		cm.timerArmed = time.Now().Add(wait)
		timer.Reset(wait)
		cm.unlock()
		select {
		case <-timer.C:
		case <-cm.timerWake:
		case <-cm.done:
			return
		}
	}
}

// runHeartbeats has no logic: on each tick it steps the core. It ends with the
// leadership, by the done channel, however long the interval is.
func (cm *ConsensusModule) runHeartbeats(done <-chan struct{}) {
	ticker := time.NewTicker(cm.core.limits.heartbeatInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			cm.step((*core).heartbeat)
		case <-done:
			return
		}
	}
}

// leadership is what WaitLeadership hands out.
type leadership struct {
	term    Term
	ctx     context.Context // nil unless this node leads and has caught up
	cancel  context.CancelFunc
	changed chan struct{} // closed when ctx begins
}

func (l *leadership) begin() {
	if l.ctx == nil {
		l.ctx, l.cancel = context.WithCancel(context.Background())
		close(l.changed)
	}
}

func (l *leadership) end() {
	if l.ctx != nil {
		l.cancel()
		l.ctx, l.cancel = nil, nil
		l.changed = make(chan struct{})
	}
}

// settle tells proposers and waiters whose answer is known.
func settle(ps []*Proposal, waits []chan struct{}) {
	for i, p := range ps {
		close(p.done)
		ps[i] = nil
	}
	for _, w := range waits {
		close(w)
	}
}

// wake signals c, which has room for one signal.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// group counts goroutines. Unlike sync.WaitGroup it can be waited for with a
// bound, without a goroutine that waits.
type group struct {
	mu   sync.Mutex
	n    int
	zero chan struct{} // made by the first empty, closed when n is 0
}

func (g *group) add() {
	g.mu.Lock()
	g.n++
	g.mu.Unlock()
}

// leave returns true if nobody is left.
func (g *group) leave() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n--
	if g.n == 0 && g.zero != nil {
		close(g.zero)
	}
	return g.n == 0
}

// empty returns a channel that is closed once nobody is left. Nobody may enter
// after it was called, except from inside.
func (g *group) empty() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.zero == nil {
		g.zero = make(chan struct{})
		if g.n == 0 {
			close(g.zero)
		}
	}
	return g.zero
}
