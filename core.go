package raft

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// core is Figure 2: the state of one server and the rules that change it. It
// has no lock, no clock, no goroutine and does no I/O: every method is one
// transition, given the time, and what the world must do next collects in out.
// The server drives it behind ConsensusModule.step, the simulator directly.
type core struct {
	limits limits
	self   memberID
	rng    *rand.Rand // the dice of election deadlines
	now    time.Time  // set before each transition
	slept  sleep      // likewise, where leases are asked for

	// Persistent state on all servers (Figure 2).
	currentTerm Term
	votedFor    memberID
	log         raftLog

	// Volatile state on all servers.
	role             Role
	leader           memberID // of currentTerm, 0 if unknown
	commitIndex      Index
	lastApplied      Index         // as far as the state machine has told since the start
	lastTime         time.Time     // of the newest entry ever in the log: stamps never decrease along it
	name             NodeID        // of this server; its number is found by it
	directory        [16]byte      // ID of its data directory
	configuration    configuration // the newest in the log, which is also the last of configs
	configs          []configEntry // the newest committed one and those after it
	inherited        Index         // up to before this entry the log is that of another cluster, which this server survived
	newestSnapshot   EntryID       // the last entry of the newest durable snapshot of this server
	replacedBy       *SnapshotMeta // it has replaced the log in this transition
	electionDeadline time.Time     // a follower or candidate campaigns then; a leader checks its quorum
	lastContact      time.Time     // with the leader
	leaderGone       bool          // it has closed its connections since
	campaign         *campaign     // while asking for votes or pre-votes
	forwardTo        memberID      // takes proposals made here: the leader, unless it refused
	wanted           Index         // somebody here waits to see this entry applied
	applyFailed      bool          // the state machine panicked: vote and replicate, but do not lead
	heldUp           bool          // it has refused a candidate that lacks entries, and heard of no leader since
	removed          bool          // told that it is no member any more: it does not campaign
	retired          bool          // this server is shutting down and does not campaign
	promisedTo       memberID      // the leader that has this server's promise; zero: one before a restart
	promisedUntil    time.Time     // nobody else gets a vote before
	savedPromise     time.Duration // no promise has more left than this; persistent: after a restart that is all that is known
	full             error         // the disk is full: the log can't grow. Vote and replicate what there is room for, but do not lead
	room             int64         // bytes of records that the disk surely has space for; set before entries of a leader are taken
	lacksRoom        bool          // it is full, and had none for the newest entries that came
	unsyncedSince    time.Time     // the disk has confirmed nothing since, and has something to confirm
	applyingSince    time.Time     // the state machine has been at work since
	failure          error         // why the role is Dead

	// Volatile state on leaders.
	progress        []*progress // of every other member, by ascending ID
	appendSeq       uint64
	transfer        transfer
	reads           reads
	heartbeatLast   Index // end of the log at the heartbeat before the last
	lastHeartbeat   Index // and at the last
	firstOfTerm     Index // the no-op that this leader appended at its election
	leaseGivenUp    bool  // somebody was told to campaign in this term, so no promise counts any more
	matchesScratch  []Index
	contactsScratch []time.Time
	promisedScratch []memberID
	spaceScratch    []memberID

	beatAt     time.Time // of the last heartbeat
	graceUntil time.Time // after a stall, a quorum is not missed before; zero once one is heard

	// What was handed to storage, and what of it is durable.
	lsn          LSN // of the newest save
	durableLSN   LSN
	hardLSN      LSN // of the newest save of the hard state
	hardSaved    HardState
	unsynced     []stagedEntries
	durableIndex Index // entries up to here are durable

	out effects
}

// limits are the parts of Config that the rules need.
type limits struct {
	electionTimeout    time.Duration
	heartbeatInterval  time.Duration
	preVote            bool
	checkQuorum        bool
	gatherBytes        int // a third append in flight waits until this much has gathered, or for gatherTime
	maxFrameBytes      int // of entries in one append
	maxInflight        int // appends to one follower
	maxInflightBytes   int
	maxTailBytes       int           // of entries in memory that nothing is about to use
	maxUncommittedSize int           // bytes of entries a leader has appended and not committed
	leasePromise       time.Duration // that a leader asks for; zero: none
	lease              time.Duration // how much of it a leader counts on, since its clock may be slower than others'
}

// stagedEntries remembers up to where a save extended the log.
type stagedEntries struct {
	lsn  LSN
	last Index
}

// HardState is what a server must remember across a crash beside its log
// (Figure 2, "persistent state on all servers").
type HardState struct {
	Term         Term
	VotedFor     uint64        // the number of a membership, 0 for nobody
	LeasePromise time.Duration // at least what is left of any that a leader was told of: after a restart no vote is given for so long
}

// effects are what the world must do after a transition.
type effects struct {
	save      *Save          // hand to storage, in order
	msgs      []message      // hand to the outbox
	hangups   []memberID     // close the append connection to these
	reads     []entryRequest // entries that are on disk only
	snapshots []snapshotRequest
	answers   []readAnswer // to reads
	events    []Event
}

// entryRequest asks for entries for a follower that is further behind than
// memory reaches. The answer enters through entriesRead.
type entryRequest struct {
	to          memberID
	lo, hi      Index
	maxBytes    int
	term        Term
	truncations uint64
}

// newCore continues from what storage recovered. The configuration is the
// newest one in the log.
func newCore(self memberID, l limits, rec Recovered, conf configuration, rng *rand.Rand, now time.Time) *core {
	c := &core{
		limits:        l,
		self:          self,
		rng:           rng,
		now:           now,
		currentTerm:   rec.HardState.Term,
		votedFor:      memberID(rec.HardState.VotedFor),
		log:           newRaftLog(rec.Start, rec.Last, rec.Runs, rec.Tail),
		commitIndex:   rec.Start.Index,
		configuration: conf,
		hardSaved:     rec.HardState,
		durableIndex:  rec.Last,
		room:          noLimit,
	}
	if p := rec.HardState.LeasePromise; p > 0 {
		// Nobody knows how much of the last one is left, nor whose it was.
		c.savedPromise, c.promisedUntil = p, now.Add(p)
	}
	for _, o := range rec.older {
		older, err := decodeConfiguration(o.data)
		if err != nil {
			c.die(fmt.Errorf("raft: entry %d: %w", o.index, err))
		}
		c.configs = append(c.configs, configEntry{o.index, older})
	}
	c.configs = append(c.configs, configEntry{rec.ConfigIndex, conf})
	for i := 1; i < len(c.configs); i++ {
		if c.configs[i].conf.clusterUUID != c.configs[i-1].conf.clusterUUID {
			c.inherited = c.configs[i].index
		}
	}
	if n := len(rec.Tail); n > 0 {
		c.sawTime(rec.Tail[n-1])
	}
	c.evict()
	c.emit(Event{Kind: EventStarted})
	if len(conf.members) > 0 {
		c.armFirst()
	}
	return c
}

// whoLeads says what this server knows about a leader that takes nothing.
func (c *core) whoLeads() string {
	switch {
	case c.role == Leader && c.transfer.to != 0:
		return fmt.Sprintf("this node leads, and hands leadership to %q", c.transfer.to.label(c))
	case c.role == Leader:
		return "this node leads, and was busy or waits for a majority of the voters or for its disk"
	case c.leader != 0:
		return fmt.Sprintf("node %q leads, and was busy or can't be reached", c.leader.label(c))
	case len(c.configuration.members) == 0:
		return "the cluster is not formed yet, or this node not added to it"
	}
	return "this node knows of none; a majority of the voters must run and reach each other"
}

// form gives an unformed server its first configuration: entry 1, which all
// founders derive alike (docs/DESIGN.md, "Formation"). Every vote is saved
// after it, so none is durable before it.
func (c *core) form(self memberID, entry1 Entries, conf configuration) {
	if c.role == Dead || len(c.configuration.members) > 0 || c.log.last != 0 {
		return
	}
	c.self = self
	c.configuration = conf
	c.configs = []configEntry{{1, conf}}
	c.log.append(entry1)
	c.armFirst()
}

// finish ends a transition: it derives what must be saved by comparing with
// what was handed out before, gives each message the position it needs, and
// returns all effects. Nobody ever asks for a save by hand, so none can be
// forgotten.
func (c *core) finish() effects {
	if c.role == Leader {
		c.continueChange()
	}
	if c.role == Leader {
		c.continueTransfer()
	}
	c.continueReads()
	if c.role == Leader {
		c.sendAppends()
	}
	c.pruneConfigurations()
	if c.role != Dead {
		c.out.save = c.deriveSave()
		for i := range c.out.msgs {
			m := &c.out.msgs[i]
			m.needs = c.hardLSN
			if m.match > 0 {
				m.needs = max(m.needs, c.positionOf(m.match))
			}
		}
	}
	out := c.out
	c.out = effects{}
	return out
}

func (c *core) hardState() HardState {
	return HardState{c.currentTerm, uint64(c.votedFor), c.savedPromise}
}

func (c *core) deriveSave() *Save {
	hard := c.hardState()
	changed := hard != c.hardSaved
	moved := c.log.start != c.log.savedStart
	if !changed && !moved && c.log.saved == c.log.last {
		return nil
	}
	if c.lsn == c.durableLSN {
		c.unsyncedSince = c.now
	}
	c.lsn++
	s := &Save{LSN: c.lsn}
	if changed {
		s.HardState = &hard
		c.hardSaved = hard
		c.hardLSN = c.lsn
	}
	if moved {
		start := c.log.start
		s.Start, s.Snapshot = &start, c.replacedBy
		c.replacedBy = nil
		c.log.savedStart = start
	}
	if c.log.saved < c.log.last {
		s.Entries, _ = c.log.from(c.log.saved+1, c.log.last, int(^uint(0)>>1))
		c.unsynced = append(c.unsynced, stagedEntries{c.lsn, c.log.last})
		c.log.saved = c.log.last
	}
	return s
}

// positionOf returns the position at which entry i is durable, 0 if it is now.
func (c *core) positionOf(i Index) LSN {
	if i <= c.durableIndex {
		return 0
	}
	for _, u := range c.unsynced {
		if i <= u.last {
			return u.lsn
		}
	}
	panic(invariantError("entry %d was never handed to storage", i))
}

// persisted takes note that everything up to lsn is durable. An entry that was
// truncated since it was staged is not confirmed by it: truncateLog has
// shortened what lsn stands for.
func (c *core) persisted(lsn LSN, took time.Duration) {
	if c.role == Dead || lsn <= c.durableLSN {
		return
	}
	c.durableLSN = lsn
	c.unsyncedSince = time.Time{}
	if c.lsn > lsn {
		c.unsyncedSince = c.now
	}
	n := 0
	for n < len(c.unsynced) && c.unsynced[n].lsn <= lsn {
		c.durableIndex = max(c.durableIndex, c.unsynced[n].last)
		n++
	}
	c.unsynced = append(c.unsynced[:0], c.unsynced[n:]...)
	c.evict()
	if c.role == Leader {
		c.advanceCommit()
	} else if took > c.limits.heartbeatInterval {
		c.armElection() // our disk was slow; that says nothing about the leader
	}
}

// evict drops what the memory for the log has no room for. What is about to be
// used stays for longer: entries that the state machine has not applied, or that
// a follower which keeps up has not confirmed. Otherwise a batch larger than that
// memory would be read back from disk right after it was written.
func (c *core) evict() {
	used := min(c.durableIndex, c.lastApplied)
	if c.role == Leader {
		for _, p := range c.progress {
			if p.state == streaming {
				used = min(used, p.match)
			}
		}
	}
	c.log.evict(c.limits.maxTailBytes, used)
	c.log.evict(max(c.limits.maxTailBytes, c.limits.maxUncommittedSize), c.durableIndex)
}

// truncateLog removes entry from and all after it, also from what is known to
// be durable: their positions confirm nothing any more.
func (c *core) truncateLog(from Index) {
	c.log.truncate(from)
	c.dropConfigurations(from)
	c.durableIndex = min(c.durableIndex, from-1)
	for i := range c.unsynced {
		c.unsynced[i].last = min(c.unsynced[i].last, from-1)
	}
}

// retire gives leadership up and does not seek it again. It returns true if
// this server led.
func (c *core) retire() bool {
	led := c.role == Leader
	c.retired = true
	if led {
		c.stepDown(ReasonShutdown)
	}
	return led
}

// want notes that somebody on this server waits to see entry i applied.
func (c *core) want(i Index) { c.wanted = max(c.wanted, i) }

// notLeading takes note that a server we believed to lead says it does not, or
// can't be reached: nothing is forwarded to it before it is heard from again.
func (c *core) notLeading(id memberID) {
	if c.forwardTo == id {
		c.forwardTo = 0
	}
}

// stopApplying takes note that the state machine has failed: this server can't
// serve any more, and hands leadership on.
func (c *core) stopApplying(i Index, err error) {
	if c.role == Dead {
		return
	}
	c.applyFailed = true
	c.emit(Event{Kind: EventApplyFailed, Index: i, Err: err})
	c.campaign = nil
	switch {
	case c.role == Leader && !c.alone():
		c.yield()
	case c.role != Follower:
		c.stepDown(ReasonApplyFailed)
	}
}

// die ends the node: no transition does anything afterwards. A nil error is a
// deliberate stop.
func (c *core) die(err error) {
	if c.role == Dead {
		return
	}
	c.role = Dead
	c.failure = err
	c.leader, c.campaign, c.progress = 0, nil, nil
	c.out.msgs, c.out.reads, c.out.snapshots = nil, nil, nil
	c.emit(Event{Kind: EventDead, Err: err})
}

func (c *core) emit(e Event) {
	e.Time, e.Term = c.now, c.currentTerm
	c.out.events = append(c.out.events, e)
}

func (c *core) send(m message) { c.out.msgs = append(c.out.msgs, m) }
