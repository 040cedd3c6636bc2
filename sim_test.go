package raft

import (
	"crypto/sha256"
	"errors"
	flags "flag"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The simulator runs a whole cluster on one goroutine in virtual time. All
// dice come from one seed, nothing iterates over a map and nothing reads the
// wall clock, so that a seed replays a run exactly. See DESIGN.md, 11.1.
var (
	simSeed     = flags.Uint64("sim.seed", 0, "replay this one seed")
	simSeeds    = flags.Int("sim.seeds", 20, "how many fresh seeds TestSim runs")
	simDuration = flags.Duration("sim.duration", 0, "run fresh seeds for this long instead")
	simBase     = flags.Uint64("sim.base", 0, "first of the fresh seeds; 0 draws one")
	simDiskFlag = flags.String("sim.disk", "", "model or wal: the same disk for all seeds, instead of what each seed draws")
	simHashes   = flags.Int("sim.hashes", 0, "print one digest of the traces of this many seeds from -sim.base, or 1, on")
	simTrace    = flags.Bool("sim.trace", false, "print every event of the run")
	simFaults   = flags.String("sim.faults", "", "with -sim.seed: only these faults, as a failure prints them, or none")
	simShrink   = flags.Duration("sim.shrink", 20*time.Second, "how long to look for a smaller schedule of faults when a seed fails")
)

type simEventKind uint8

const (
	evTimer simEventKind = iota + 1
	evHeartbeat
	evRequest
	evReply
	evAppendFailed
	evFlushed
	evRead
	evApply
	evForwardTimeout
	evClient
	evNemesis
	evRestart
	evPhase
	evResume
	evMembers
	evThen
)

var simEventNames = [...]string{"", "timer", "heartbeat", "request", "reply", "append failed", "flushed", "read", "apply", "forward timeout", "client", "nemesis", "restart", "phase", "resume", "members", "then"}

// simEvent is one thing that will happen. It concerns a node in one of its
// runs: a crash makes it void.
type simEvent struct {
	at    time.Duration
	seq   uint64
	kind  simEventKind
	node  int
	run   uint32
	lsn   LSN
	took  time.Duration
	msg   *simMsg
	read  *simRead
	then  func()
	epoch uint32 // of the network: healing drops what is under way
}

// simSwarm is what a seed draws at the beginning: the sizes, the limits, and
// which faults occur how often. Averages over all of them would find less: a
// bug often needs one fault to be frequent and another to be absent.
type simSwarm struct {
	nodes, voters  int // founders, and how many of them vote
	spares         int // nodes that wait to be added; zero where the membership is fixed
	membersEvery   time.Duration
	timeout        time.Duration
	wal            bool // the real log on a file system that loses power
	ordered        bool // append streams keep their order, as TCP would
	delayMin       time.Duration
	delayMean      time.Duration
	tailP          float64 // a message takes much longer
	oldP           float64 // a reply takes several election timeouts
	dropP          float64
	breakP         float64 // an append breaks its connection
	dupP           float64
	flushMean      time.Duration
	flushTailP     float64
	flushFailP     float64
	boundaryP      float64 // a crash is armed at one of the next saves and sends
	applyMean      time.Duration
	readMean       time.Duration
	readTailP      float64 // a read of the log takes up to ten election timeouts
	tailBytes      int     // the most that nodes hold in memory
	nemesisEvery   time.Duration
	nemeses        []int
	clientEvery    time.Duration
	batchMax       int
	dataMax        int
	keys           int
	lagMax         Index // clients pause while a node is this far behind
	rounds         int
	roundTimeouts  int     // length of a round of faults in election timeouts
	snapshotP      float64 // a node takes a snapshot after it has applied something
	snapshotFailP  float64
	snapshotSlowP  float64
	installLateP   float64 // a stored snapshot takes much longer to be installed
	blockBytes     int     // of a snapshot, in one message
	stateMax       int     // bytes of padding in a snapshot
	prepareP       float64 // the real log is tended after a flush: segments prepared and reclaimed
	sessions       int     // clients with a session
	sessionP       float64 // a command is one of theirs
	sessionTimeout time.Duration
	losses         int           // how many voters may lose their disk; always a minority
	lease          time.Duration // that leaders ask for; zero: there are none
	leasesChange   bool          // nodes that start may ask for shorter ones
	driftPercent   int           // that leases allow for
	clockSpread    float64       // by how much rates of clocks do differ, where there are leases
}

type sim struct {
	seed     uint64
	plan     simPlan
	dice     simDice
	rng      *rand.Rand // rolls dice
	counts   [simDecisions][]uint32
	struck   []simStrike
	unnamed  int // number of strikes up to the one that the next note describes, or 0
	swarm    simSwarm
	now      time.Duration
	seq      uint64
	heap     []simEvent
	nodes    []*simNode
	links    []simLink     // from*n + to
	conf     configuration // of the founders
	netEpoch uint32
	faulty   bool // in a round of faults; else healed

	phaseStarted time.Duration
	round        int
	core         []bool // the nodes that were healed
	healTimes    []float64

	book             ledger
	load             simClients
	members          simMembers
	steps            int
	judged           int // histories that porcupine saw
	refused, hangups int // appends refused by followers of the same term, connections given up
	losses           simLosses
	snaps            simSnapshots
	reads            simReads
	sessions         simSessionCounts
	hash             uint64
	ring             []simRecord
	done             bool
}

type simRecord struct {
	at   time.Duration
	node int
	kind simEventKind
	msg  *simMsg
	ev   Event
	note string
}

var simEpoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// simResult is what a run found.
type simResult struct {
	err       error
	hash      uint64
	steps     int
	simulated time.Duration
	healTimes []float64 // in election timeouts
	committed Index
	elections int
	ok, lost  int         // client operations answered, and those without an answer
	judged    int         // histories that porcupine judged
	class     string      // of err: which check failed
	struck    []simStrike // the faults, in order
	losses    simLosses
	snaps     simSnapshots
	reads     simReads
	sessions  simSessionCounts
	timeout   time.Duration
	nodes     int
	members   simMembers
	tail      string
}

// simPlan says how a seed is run other than the seed itself says.
type simPlan struct {
	test  string            // that runs it; for the command that replays it
	disk  string            // model or wal; empty: what the seed draws
	only  map[simFault]bool // no other faults strike; nil: whatever the dice say
	until time.Duration     // give up then, if positive
	tune  func(*simSwarm)   // changes what the seed drew
	check func(*sim)        // an invariant of a test's own, after each event
}

// runSim runs one seed to its end or to the first broken invariant.
func runSim(seed uint64, plan simPlan) (res simResult) {
	s := newSim(seed, plan)
	defer func() {
		res.struck, res.timeout, res.losses, res.snaps, res.reads = s.struck, s.swarm.timeout, s.losses, s.snaps, s.reads
		res.nodes, res.sessions = len(s.nodes), s.sessions
		res.hash, res.steps, res.simulated, res.healTimes = s.hash, s.steps, s.now, s.healTimes
		res.committed, res.elections = Index(len(s.book.committed)), s.book.elections
		res.judged, res.members = s.judged, s.members
		res.ok, res.lost = s.load.answered, s.load.unknown
		if r := recover(); r != nil {
			var f simFailure
			if err, ok := r.(error); ok && errors.As(err, &f) {
				res.err, res.class = err, f.class
			} else {
				res.err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
				res.class = digits.ReplaceAllString(fmt.Sprint("panic: ", r), "")
			}
			res.tail = s.lastEvents(80)
		}
	}()
	s.start()
	for len(s.heap) > 0 && !s.done {
		e := s.pop()
		s.now = e.at
		s.handle(e)
		s.checkLeases()
		if plan.check != nil {
			plan.check(s)
		}
		if plan.until > 0 && s.now > plan.until {
			return
		}
	}
	s.finalChecks()
	return
}

// simFailure is a broken invariant. All failures of one check are of one class.
type simFailure struct{ msg, class string }

func (f simFailure) Error() string { return f.msg }

func (s *sim) fail(format string, args ...any) {
	panic(simFailure{fmt.Sprintf(format, args...), format})
}

func newSim(seed uint64, plan simPlan) *sim {
	s := &sim{seed: seed, plan: plan, hash: 14695981039346656037}
	s.rng = rand.New(&s.dice)
	s.turn(turnSetup, 0)
	s.ring = make([]simRecord, 0, 512)
	s.drawSwarm()
	s.drawMembers()
	s.drawSessions()
	s.drawLeases()
	s.drawHangs()
	if plan.tune != nil {
		plan.tune(&s.swarm)
	}
	s.build()
	return s
}

// build makes the nodes that the swarm asks for.
func (s *sim) build() {
	n := s.swarm.nodes
	slots := n + s.swarm.spares
	s.links = make([]simLink, slots*slots)
	for i := range n {
		s.conf.members = append(s.conf.members, member{id: memberID(i + 1), name: simName(i), learner: i >= s.swarm.voters, dirID: simDirectory(i, 0)})
	}
	first := makeEntry(entryConfiguration, EntryID{1, 0}, time.Time{}, s.conf.encode())
	s.book.init(s)
	s.book.appended(s, 0, first, 0)
	for i := range slots {
		if i == n {
			first = Entries{} // the others have nothing
		}
		s.nodes = append(s.nodes, newSimNode(s, i, first))
	}
	s.load.init(s)
}

// logUniform draws between lo and hi so that each order of magnitude is as likely.
func (s *sim) logUniform(lo, hi float64) float64 {
	r := s.rng.Float64()
	v := lo
	for hi/v > 2 { // 2^k steps keep to exactly reproducible arithmetic
		if r *= 2; r < 1 {
			break
		}
		r--
		v *= 2
	}
	return min(hi, v*(1+s.rng.Float64()))
}

func (s *sim) between(lo, hi int) int { return lo + s.rng.IntN(hi-lo+1) }

func (s *sim) chance(p float64) bool { return p > 0 && s.rng.Float64() < p }

// sometimes returns 0 for most seeds, so that each fault is absent from many.
func (s *sim) sometimes(p, lo, hi float64) float64 {
	if !s.chance(p) {
		return 0
	}
	return s.logUniform(lo, hi)
}

func (s *sim) drawSwarm() {
	w := &s.swarm
	w.nodes = []int{1, 2, 3, 3, 3, 3, 4, 5, 5, 5, 6, 7}[s.rng.IntN(12)]
	w.voters = w.nodes
	if w.nodes > 2 && s.chance(0.25) {
		w.voters -= s.between(1, (w.nodes-1)/2)
	}
	w.timeout = time.Duration(s.between(30, 400)) * time.Millisecond
	t := float64(w.timeout)
	w.ordered = s.chance(0.5)
	w.delayMin = time.Duration(t * s.logUniform(0.0005, 0.01))
	w.delayMean = time.Duration(t * s.logUniform(0.001, 0.1))
	w.tailP = s.sometimes(0.6, 0.002, 0.2)
	w.oldP = s.sometimes(0.5, 0.002, 0.2)
	w.dropP = s.sometimes(0.6, 0.001, 0.2)
	w.breakP = s.sometimes(0.4, 0.001, 0.05)
	w.dupP = s.sometimes(0.5, 0.002, 0.3)
	w.flushMean = time.Duration(t * s.logUniform(0.0005, 0.2))
	w.flushTailP = s.sometimes(0.4, 0.001, 0.1)
	w.flushFailP = s.sometimes(0.2, 0.0002, 0.01)
	w.boundaryP = s.sometimes(0.6, 0.05, 1)
	w.applyMean = time.Duration(t * s.logUniform(0.0005, 0.1))
	w.readMean = time.Duration(t * s.logUniform(0.0005, 0.1))
	w.readTailP = s.sometimes(0.5, 0.01, 0.5)
	w.tailBytes = 65536
	w.nemesisEvery = time.Duration(t * s.logUniform(0.2, 8))
	for f := range nemesisCount {
		if s.chance(0.5) {
			w.nemeses = append(w.nemeses, f)
		}
	}
	if len(w.nemeses) == 0 {
		w.nemeses = []int{s.rng.IntN(nemesisCount)}
	}
	w.clientEvery = time.Duration(t * s.logUniform(0.02, 1))
	w.batchMax = s.between(1, 6)
	w.dataMax = s.between(0, 300)
	w.lagMax = 300
	w.keys = s.between(1, simKeys)
	w.rounds = s.between(1, 4)
	w.roundTimeouts = s.between(10, 60)
	w.wal = s.chance(0.2)
	if s.plan.disk != "" {
		w.wal = s.plan.disk == "wal"
	}
	if s.chance(0.4) {
		s.drawChurn(w)
	}
	if s.chance(0.15) { // a history that an independent judge can take in
		w.clientEvery = time.Duration(t * s.logUniform(0.5, 4))
		w.batchMax, w.rounds = 1, 1
	}
	if s.chance(0.4) {
		w.losses = s.between(1, 3)
	}
	w.prepareP = s.logUniform(0.02, 1)
	w.snapshotP = s.sometimes(0.7, 0.002, 0.2)
	w.snapshotFailP = s.sometimes(0.4, 0.001, 0.1)
	w.snapshotSlowP = s.sometimes(0.5, 0.01, 0.5)
	w.installLateP = s.sometimes(0.5, 0.05, 1)
	w.blockBytes = int(s.logUniform(16, 512))
	w.stateMax = s.between(0, 300)
}

// drawHangs lets disks hang in a fifth of the seeds, and state machines fail in
// another.
func (s *sim) drawHangs() {
	defer s.back(s.turn(turnSetup, 1))
	if s.chance(0.2) {
		s.swarm.nemeses = append(s.swarm.nemeses, nemHang, nemHang)
	}
	if s.chance(0.2) {
		s.swarm.nemeses = append(s.swarm.nemeses, nemApplyFails, nemApplyFails)
	}
}

// drawChurn makes leaderships short and messages old: the conditions of
// Figure 8 and of whatever else needs three leaders in a row.
func (s *sim) drawChurn(w *simSwarm) {
	t := float64(w.timeout)
	w.nodes = s.between(3, 5)
	w.voters = w.nodes
	w.nemeses = append(w.nemeses, nemCampaign, nemCampaignMore)
	w.nemesisEvery = time.Duration(t * s.logUniform(0.03, 0.6))
	w.clientEvery = time.Duration(t * s.logUniform(0.05, 1))
	w.delayMean = time.Duration(t * s.logUniform(0.005, 0.1))
	w.tailP = s.logUniform(0.02, 0.4)
	w.oldP = s.sometimes(0.8, 0.02, 0.4)
	w.lagMax = 60
	if s.chance(0.5) {
		w.readTailP, w.tailBytes = 0.5, 100
	}
	if s.chance(0.4) { // answers outlive several leaderships, of nodes that do not crash
		w.nodes = s.between(4, 5)
		w.voters = w.nodes
		w.nemeses = []int{nemMinority, nemMinority, nemSplit, nemCampaign, nemCampaignMore, nemHealNet}
		w.boundaryP, w.flushFailP, w.breakP = 0, 0, 0
		w.nemesisEvery = time.Duration(t * s.logUniform(0.1, 1))
		w.clientEvery = time.Duration(t * s.logUniform(0.02, 0.2))
		w.flushMean = time.Duration(t * s.logUniform(0.0005, 0.01))
		w.oldP = s.logUniform(0.1, 0.5)
	}
	w.roundTimeouts = s.between(20, 100)
}

// drawLimits differ from node to node, as they do during a rolling change.
func (s *sim) drawLimits(uniform bool, base *limits) limits {
	if uniform && base != nil {
		return *base
	}
	t := s.swarm.timeout
	l := limits{
		electionTimeout:    t,
		gatherBytes:        int(s.logUniform(1, 4096)),
		maxFrameBytes:      int(s.logUniform(64, 8192)),
		maxInflight:        s.between(2, 12),
		maxInflightBytes:   int(s.logUniform(64, 65536)),
		maxTailBytes:       int(s.logUniform(1, float64(s.swarm.tailBytes))),
		maxUncommittedSize: int(s.logUniform(1024, 65536)),
	}
	l.heartbeatInterval = t / time.Duration(s.between(3, 10))
	l.checkQuorum = s.chance(0.8)
	l.preVote = l.checkQuorum && s.chance(0.8)
	if w := &s.swarm; w.lease > 0 && (uniform || s.chance(0.8)) {
		l.leasePromise, l.lease = w.lease, leaseWithin(w.lease, w.driftPercent)
	}
	return l
}

func (s *sim) push(e simEvent) {
	s.seq++
	e.seq = s.seq
	s.heap = append(s.heap, e)
	i := len(s.heap) - 1
	for i > 0 {
		p := (i - 1) / 2
		if !earlier(&s.heap[i], &s.heap[p]) {
			break
		}
		s.heap[i], s.heap[p] = s.heap[p], s.heap[i]
		i = p
	}
}

func earlier(a, b *simEvent) bool { return a.at < b.at || a.at == b.at && a.seq < b.seq }

func (s *sim) pop() simEvent {
	top := s.heap[0]
	n := len(s.heap) - 1
	s.heap[0] = s.heap[n]
	s.heap[n] = simEvent{}
	s.heap = s.heap[:n]
	for i := 0; ; {
		c := 2*i + 1
		if c >= n {
			break
		}
		if c+1 < n && earlier(&s.heap[c+1], &s.heap[c]) {
			c++
		}
		if !earlier(&s.heap[c], &s.heap[i]) {
			break
		}
		s.heap[i], s.heap[c] = s.heap[c], s.heap[i]
		i = c
	}
	return top
}

func (s *sim) mix(v uint64) {
	s.hash ^= v
	s.hash *= 0x9e3779b97f4a7c15
	s.hash ^= s.hash >> 29
}

func (s *sim) note(node int, format string, args ...any) {
	what := fmt.Sprintf(format, args...)
	s.record(simRecord{at: s.now, node: node, note: what})
	if s.unnamed > 0 {
		s.struck[s.unnamed-1].what = what
		s.unnamed = 0
	}
}

func (s *sim) record(r simRecord) {
	if *simTrace {
		fmt.Fprintln(os.Stderr, r)
	}
	if len(s.ring) < cap(s.ring) {
		s.ring = append(s.ring, r)
		return
	}
	copy(s.ring, s.ring[cap(s.ring)/2:])
	s.ring = append(s.ring[:cap(s.ring)-cap(s.ring)/2], r)
}

func (s *sim) lastEvents(n int) string {
	var b strings.Builder
	for _, r := range s.ring[max(0, len(s.ring)-n):] {
		fmt.Fprintln(&b, r)
	}
	return b.String()
}

func (r simRecord) String() string {
	who := "[SIM]"
	if r.node >= 0 {
		who = fmt.Sprintf("[%d]", r.node)
	}
	what := r.note
	switch {
	case r.msg != nil:
		what = simEventNames[r.kind] + " " + r.msg.String()
	case r.ev.Kind != 0:
		what = r.ev.String()
	case what == "":
		what = simEventNames[r.kind]
	}
	return fmt.Sprintf("%12v %s %s", r.at, who, what)
}

// start lets the nodes, the clients and the first round of faults begin.
func (s *sim) start() {
	for _, n := range s.nodes {
		s.boot(n)
	}
	s.core = make([]bool, len(s.nodes))
	s.push(simEvent{at: s.swarm.clientEvery, kind: evClient})
	if s.swarm.spares > 0 {
		s.push(simEvent{at: s.swarm.membersEvery, kind: evMembers})
	}
	s.beginFaults()
}

func (s *sim) beginFaults() {
	s.faulty = true
	s.round++
	for _, n := range s.nodes {
		if s.swarm.lease > 0 {
			s.setClock(n, 0, s.drawRate())
			s.armTimer(n)
		}
		if n.core == nil && !n.restarting {
			s.restartAfter(n, time.Duration(s.rng.Int64N(int64(s.swarm.timeout))))
		}
	}
	s.push(simEvent{at: s.now + time.Duration(s.rng.Int64N(int64(s.swarm.nemesisEvery)+1)), kind: evNemesis, epoch: uint32(s.round)})
	s.push(simEvent{at: s.now + time.Duration(s.swarm.roundTimeouts)*s.swarm.timeout, kind: evPhase})
	s.note(-1, "round %d of faults begins", s.round)
}

// handle makes one event happen. Events of a paused node wait for it.
func (s *sim) handle(e simEvent) {
	s.turn(turnEvent+simDecision(e.kind), e.node)
	s.mix(uint64(e.at))
	s.mix(uint64(e.kind)<<8 | uint64(e.node))
	switch e.kind {
	case evClient:
		s.load.arrive(s)
		return
	case evMembers:
		s.changeMembers()
		return
	case evNemesis:
		if s.faulty && e.epoch == uint32(s.round) {
			s.nemesis()
			s.unnamed = 0
		}
		return
	case evPhase:
		s.phase()
		return
	case evResume:
		if n := s.nodes[e.node]; n.pausedUntil <= s.now {
			s.resume(n)
		}
		return
	case evRestart:
		if n := s.nodes[e.node]; e.lsn == n.restartSeq {
			s.crash(n)
			s.boot(n)
		}
		return
	}
	n := s.nodes[e.node]
	if e.msg != nil && e.epoch != s.netEpoch && e.kind != evForwardTimeout || e.kind == evRequest && e.msg.call.toDisk != n.disks {
		return
	}
	if n.core == nil || e.run != 0 && e.run != n.run {
		return
	}
	if n.pausedUntil > s.now {
		n.deferred = append(n.deferred, e)
		return
	}
	if e.kind == evRequest || e.kind == evReply || e.kind == evAppendFailed || e.kind == evFlushed {
		s.record(simRecord{at: s.now, node: e.node, kind: e.kind, msg: e.msg})
	}
	s.onNode(n, e)
	if n.core != nil {
		s.mix(uint64(n.core.currentTerm)<<32 ^ uint64(n.core.commitIndex)<<16 ^ uint64(n.core.log.last)<<3 ^ uint64(n.core.role))
		s.armCrash(n)
	}
}

// resume lets everything happen that waited for a paused node.
func (s *sim) resume(n *simNode) {
	s.wake(n)
	n.pausedUntil = 0
	waiting := n.deferred
	n.deferred = nil
	for _, e := range waiting {
		e.at = s.now
		s.push(e)
	}
}

// simSummary adds up many runs.
type simSummary struct {
	seeds, steps, elections int
	judged                  int
	losses                  simLosses
	snaps                   simSnapshots
	reads                   simReads
	sessions                simSessionCounts
	answered, unknown       int
	committed               Index
	members                 simMembers
	simulated, wall         time.Duration
	heals                   []float64
}

func (t *simSummary) add(r simResult) {
	t.seeds++
	t.judged += r.judged
	t.losses.add(r.losses)
	t.members.add(&r.members)
	t.snaps.add(r.snaps)
	t.reads.add(r.reads)
	t.sessions.add(r.sessions)
	t.steps += r.steps
	t.elections += r.elections
	t.answered += r.ok
	t.unknown += r.lost
	t.committed += r.committed
	t.simulated += r.simulated
	t.heals = append(t.heals, r.healTimes...)
}

func (t *simSummary) String() string {
	slices.Sort(t.heals)
	at := func(p float64) float64 {
		if len(t.heals) == 0 {
			return 0
		}
		return t.heals[int(p*float64(len(t.heals)-1))]
	}
	return fmt.Sprintf("%d seeds, %d steps in %v (%.0f/s), %v simulated (%.0f times real time), %d committed, %d elections, %d answered, %d unknown, %d histories judged by porcupine; disks: %+v; snapshots: %+v; reads: %+v; sessions: %+v; %v; %d times healed: p50 %.2f p99 %.2f max %.2f election timeouts",
		t.seeds, t.steps, t.wall.Round(time.Millisecond), float64(t.steps)/t.wall.Seconds(), t.simulated.Round(time.Second), t.simulated.Seconds()/t.wall.Seconds(),
		t.committed, t.elections, t.answered, t.unknown, t.judged, t.losses, t.snaps, t.reads, t.sessions, &t.members, len(t.heals), at(0.5), at(0.99), at(1))
}

// TestSim runs fresh seeds, or the one of -sim.seed.
func TestSim(t *testing.T) {
	if *simSeed != 0 {
		replaySim(t, simPlan{test: "TestSim", disk: *simDiskFlag})
		return
	}
	base := *simBase
	if base == 0 {
		base = uint64(time.Now().UnixNano()) // the wall clock chooses the seeds only
	}
	t.Logf("fresh seeds from -sim.base=%d", base)
	sum := &simSummary{}
	started := time.Now()
	plan := simPlan{test: "TestSim", disk: *simDiskFlag}
	n := *simSeeds
	if *simDuration > 0 {
		n = 0
	}
	runSeeds(t, seedsFrom(base, plan, atLeast(n)), func(seed uint64, res simResult) {
		sum.add(res)
		if h := slices.Max(append(res.healTimes, 0)); h > 6 {
			t.Logf("seed %d took %.2f election timeouts to heal", seed, h)
		}
	})
	sum.wall = time.Since(started)
	t.Log(sum)
	if sum.seeds >= 20 && (sum.committed == 0 || sum.members.committed == 0 || sum.answered == 0 || sum.reads.allowed == 0 || sum.reads.refused == 0 || sum.sessions.Opened == 0 || sum.sessions.Asked == 0 || len(sum.heals) == 0) {
		t.Errorf("the simulation did nothing: %v", sum)
	}
}

// seedsFrom yields seeds with their plan, for as long as more wants the next one.
// It is asked when there is somebody to run it, with how many came before.
func seedsFrom(base uint64, plan simPlan, more func(n int) bool) iter.Seq2[uint64, simPlan] {
	return func(yield func(uint64, simPlan) bool) {
		for n := 0; more(n) && yield(base+uint64(n), plan); n++ {
		}
	}
}

// atLeast wants n seeds, and more for as long as -sim.duration says: the wall
// clock chooses how many seeds run only.
func atLeast(n int) func(int) bool {
	began := time.Now()
	return func(had int) bool { return had < n || time.Since(began) < *simDuration }
}

// seedCount is n, and a quarter of it under the race detector, which takes up to
// ten times as long, and sees nothing in the simulator, where a seed runs on one
// goroutine.
func seedCount(n int) int {
	if raceEnabled {
		return (n + 3) / 4
	}
	return n
}

// untilSeen wants n seeds, or as many as seedCount says, and then up to n for as
// long as something is missing that must have happened in them.
func untilSeen(n int, missing func() bool) func(int) bool {
	more := atLeast(seedCount(n))
	return func(had int) bool { return more(had) || had < n && missing() }
}

// runSeeds runs seeds, as many at once as there are processors, each on one
// goroutine. It reports their failures and hands over their results, in order, and
// ends with the first failure.
func runSeeds(t *testing.T, seeds iter.Seq2[uint64, simPlan], add func(seed uint64, res simResult)) {
	t.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // a run is short and small
	type run struct {
		seed   uint64
		plan   simPlan
		result chan simResult
	}
	next, stop := iter.Pull2(seeds)
	defer stop()
	var runs []run
	for more := true; ; {
		for more && !t.Failed() && len(runs) < runtime.GOMAXPROCS(0) {
			r := run{result: make(chan simResult, 1)}
			if r.seed, r.plan, more = next(); more {
				go func() { r.result <- runSim(r.seed, r.plan) }()
				runs = append(runs, r)
			}
		}
		if len(runs) == 0 {
			return
		}
		r := runs[0]
		runs = runs[1:]
		if res := <-r.result; !t.Failed() {
			reportSim(t, r.seed, r.plan, res)
			add(r.seed, res)
		}
	}
}

// TestSimHashes prints one digest of the traces of many seeds. It must be the
// same however the test is run: on one processor or on several, with the race
// detector or without.
func TestSimHashes(t *testing.T) {
	if *simHashes == 0 {
		t.Skip("needs -sim.hashes")
	}
	base := max(*simBase, 1)
	digest := sha256.New()
	started := time.Now()
	steps := 0
	plan := simPlan{test: "TestSim", disk: *simDiskFlag}
	runSeeds(t, seedsFrom(base, plan, func(n int) bool { return n < *simHashes }), func(seed uint64, res simResult) {
		steps += res.steps
		fmt.Fprintf(digest, "%d %016x %d %d %d\n", seed, res.hash, res.steps, len(res.struck), res.committed)
	})
	t.Logf("seeds %d to %d, %d steps in %v, GOMAXPROCS %d, race %v: digest %x",
		base, base+uint64(*simHashes)-1, steps, time.Since(started).Round(time.Second), runtime.GOMAXPROCS(0), raceEnabled, digest.Sum(nil)[:16])
}

// TestSimRegressions runs the seeds of testdata/sim/seeds.txt.
func TestSimRegressions(t *testing.T) {
	b, err := os.ReadFile("testdata/sim/seeds.txt")
	if err != nil {
		t.Fatal(err)
	}
	type seedAndPlan struct {
		seed uint64
		plan simPlan
	}
	var list []seedAndPlan
	for line := range strings.Lines(string(b)) {
		what, why, _ := strings.Cut(line, "#")
		words := strings.Fields(what)
		if len(words) == 0 {
			continue
		}
		plan := simPlan{test: "TestSim"}
		seed, err := strconv.ParseUint(words[0], 10, 64)
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			switch {
			case key == "disk" && (value == "model" || value == "wal"):
				plan.disk = value
			case key == "faults" && err == nil:
				plan.only, err = parseFaults(value)
			default:
				t.Fatalf("seeds.txt: %q is neither disk=model, disk=wal nor faults=...", w)
			}
		}
		if err != nil || strings.TrimSpace(why) == "" {
			t.Fatalf("seeds.txt: %q: want a seed, what it needs, and # why: %v", line, err)
		}
		list = append(list, seedAndPlan{seed, plan})
	}
	if len(list) == 0 {
		t.Error("no seeds")
	}
	runSeeds(t, func(yield func(uint64, simPlan) bool) {
		for _, s := range list[:seedCount(len(list))] {
			if !yield(s.seed, s.plan) {
				return
			}
		}
	}, func(uint64, simResult) {})
}

// TestSimReplays runs seeds twice: a simulation that does not repeat itself
// can't be debugged.
func TestSimReplays(t *testing.T) {
	var before simResult
	runSeeds(t, func(yield func(uint64, simPlan) bool) {
		for k := range uint64(seedCount(8)) {
			seed := k + 3 // 2 is the longest of the first ones
			plan := simPlan{test: "TestSim"}
			for range 2 {
				if !yield(seed, plan) {
					return
				}
			}
		}
	}, func(seed uint64, res simResult) {
		if before.steps == 0 {
			before = res
			return
		}
		if a, b := before, res; a.hash != b.hash || a.steps != b.steps {
			t.Errorf("seed %d: hash %016x after %d steps, then %016x after %d", seed, a.hash, a.steps, b.hash, b.steps)
		}
		before = simResult{}
	})
}
