package raft

import (
	"fmt"
	"net"
	"net/rpc"
	"sync"
	"sync/atomic"
	"time"
)

// link is one outbound connection to one peer, dialled when there is something
// to send and closed when there was nothing for a while. One goroutine at a
// time owns it: it dials, sends, and takes the answers, so that a frame pulled
// by an answer leaves without waking anybody.
type link struct {
	server  *Server
	to      memberID
	channel channel
	window  int // unanswered calls at once, and the capacity of answers

	mu      sync.Mutex
	queue   []outgoing
	running bool     // a goroutine owns the link
	conn    net.Conn // the owner's, for hangup
	hungUp  bool     // conn was closed by hangup: what is queued after that is not for it
	failure error    // why the last attempt to connect failed; nil after one that succeeded

	deposed atomic.Bool // another server leads than this peer
	wakeup  chan struct{}
	answers chan *rpc.Call
}

// outgoing is a message, a batch of proposals to forward, or entries to be read first.
type outgoing struct {
	m     message
	batch proposalBatch
	read  *entryRequest
	ask   *readArgs // for the index of reads
}

const (
	linkWindow      = 64 // calls unanswered on a control link; append windows are the core's
	forwardsAtOnce  = 1  // a batch that comes back refused keeps its place before later ones
	linkIdleTimeout = 10 * time.Second
)

func newLink(s *Server, to memberID, ch channel) *link {
	window := linkWindow
	if ch == channelAppend {
		window = 2 * s.conf.MaxInflightAppends
	}
	return &link{
		server: s, to: to, channel: ch, window: window,
		wakeup: make(chan struct{}, 1), answers: make(chan *rpc.Call, window),
	}
}

// push queues o; the goroutine that owns the link is started if there is none.
// The module's lock is held. If too much waits already, o is lost, as on a network.
func (l *link) push(o outgoing) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) >= l.window {
		return false
	}
	l.queue = append(l.queue, o)
	if !l.running {
		l.running = l.server.cm.start(l.run)
		if !l.running {
			return false
		}
		l.server.cm.diskUsers.add()
	}
	wake(l.wakeup)
	return true
}

func (l *link) take(buf []outgoing) []outgoing {
	l.mu.Lock()
	defer l.mu.Unlock()
	buf = append(buf[:0], l.queue...)
	clear(l.queue)
	l.queue = l.queue[:0]
	return buf
}

// hangup closes the connection; the owner notices and tells the core.
func (l *link) hangup() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != nil {
		l.hungUp = true
		l.conn.Close()
	}
}

// leave ends the ownership if nothing is queued.
func (l *link) leave() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running = len(l.queue) > 0
	return !l.running
}

// run owns the link until it was idle for a while or the node stops.
func (l *link) run() {
	s := l.server
	defer s.cm.leaveDisk()
	o := linkOwner{link: l}
	defer o.disconnect()
	idle := time.NewTimer(o.restFor())
	defer idle.Stop()
	for {
		select {
		case <-l.wakeup:
			o.out = l.take(o.out)
			o.send()
		case call := <-l.answers:
			o.answered(call)
		case end := <-o.ended():
			o.client.sentinel.Done <- end // for Close
			o.lost()
		case <-idle.C:
			o.disconnect() // unused, or hung: unanswered calls come back as answers
			if o.outstanding == 0 && l.leave() {
				return
			}
		case <-s.cm.done:
			o.abandon()
			return
		}
		idle.Reset(o.restFor())
	}
}

// linkOwner is what only the goroutine that owns a link touches.
type linkOwner struct {
	*link
	client      *rpcClient
	conn        net.Conn
	since       time.Time // conn was dialled
	directory   [16]byte  // of the peer on conn, or on the last one
	outstanding int       // calls whose answers are to come
	owed        int       // of these, calls that were made because the peer led
	heard       time.Time // the last answer, or when the first unanswered call was sent
	retryAt     time.Time // no dialling before
	out         []outgoing
	calls       []*rpc.Call
}

// restFor is how long the link may go on without anything happening. A peer
// that owes answers has less time: whoever waits for them must be told, even
// if nothing more is ever sent there.
func (o *linkOwner) restFor() time.Duration {
	if o.outstanding == 0 {
		// A leader that closes its connections between two heartbeats would be
		// taken for dead (leaderLeft).
		return max(linkIdleTimeout, 2*o.server.conf.HeartbeatInterval)
	}
	return max(o.patience()-time.Since(o.heard), time.Millisecond)
}

// patience is how long calls may stay unanswered before the connection is taken
// for hung. The core watches appends itself. Who has proposed or read something
// at a leader that is replaced must learn soon that there is no answer: another
// leader could give one. A forward and a read wait for no disk there.
func (o *linkOwner) patience() time.Duration {
	if o.owed > 0 && o.deposed.Load() {
		return o.server.conf.ElectionTimeout / 2
	}
	return o.server.linkPatience()
}

func (s *Server) linkPatience() time.Duration { return 2 * s.conf.ElectionTimeout }

// send issues what was queued and writes all of it at once.
func (o *linkOwner) send() {
	if o.outstanding > 0 && time.Since(o.heard) >= o.patience() {
		o.disconnect() // it answers nothing: dial anew
	}
	if o.client != nil && (o.wasHungUp() || o.client.Err() != nil) {
		o.lost() // it ended while it was idle: nothing must be lost in it
	}
	issued := false
	for i := range o.out {
		out := o.out[i]
		o.out[i] = outgoing{}
		switch {
		case out.read != nil:
			o.server.readEntries(*out.read)
		case o.outstanding >= o.window || !o.connect(out.m.vote != nil):
			o.server.unsent(o.to, out)
		default:
			if o.outstanding == 0 {
				o.heard = time.Now()
			}
			o.outstanding++
			o.issue(out)
			issued = true
		}
	}
	if issued {
		o.client.Flush() // a failure closes the connection, and every call is answered with it
	}
}

func (o *linkOwner) issue(out outgoing) {
	switch {
	case out.m.append != nil:
		o.client.Go(methodAppendEntries, &call[appendArgs]{V: *out.m.append}, &call[appendReply]{}, o.answers)
	case out.m.vote != nil:
		o.client.Go(methodRequestVote, &call[voteArgs]{V: *out.m.vote}, &call[voteReply]{}, o.answers)
	case out.ask != nil:
		o.owed++
		o.client.Go(methodReadIndex, &call[readArgs]{V: readArgs{o.server.selfID(), out.ask.Lease}}, &call[readReply]{}, o.answers)
	default:
		o.owed++
		args := forwardArgs{From: o.server.selfID(), Count: len(out.batch.proposals), Encoded: out.batch.entries.buf, batch: out.batch}
		o.client.Go(methodForward, &call[forwardArgs]{V: args}, &call[forwardReply]{}, o.answers)
	}
}

// connect returns true if there is a connection, after dialling if need be. After
// an attempt in vain it waits a little, unless it is urgent: a candidate asks for
// a vote once in an election timeout, and the peer may be back since.
func (o *linkOwner) connect(urgent bool) bool {
	if o.client != nil {
		return true
	}
	s := o.server
	if !urgent && time.Now().Before(o.retryAt) {
		return false
	}
	conn, client, directory, err := s.dial(o.to, o.channel)
	o.link.connected(err)
	if err != nil {
		o.retryAt = time.Now().Add(min(s.conf.HeartbeatInterval/2, s.conf.ElectionTimeout/4))
		return false
	}
	o.conn, o.since = conn, time.Now()
	o.link.setConn(conn)
	o.client, o.directory = client, directory
	return true
}

// ended is ready when the connection has ended by itself.
func (o *linkOwner) ended() <-chan *rpc.Call {
	if o.client == nil {
		return nil
	}
	return o.client.sentinel.Done
}

// lost cleans up after a connection that has ended by itself. A leader shows at
// once that it is there, or it would be taken for dead (leaderLeft); but not in
// a loop with a peer that hangs up as soon as it is called.
func (o *linkOwner) lost() {
	if o.client == nil {
		return
	}
	o.disconnect()
	s := o.server
	if o.channel == channelControl && time.Since(o.since) >= s.conf.HeartbeatInterval {
		s.cm.step(func(c *core) { c.reconnect(o.to) })
	}
}

// disconnect closes the connection, joins net/rpc's goroutine and takes the
// answers to all its calls: none must be left that ends the next connection.
func (o *linkOwner) disconnect() {
	if o.client == nil {
		return
	}
	o.link.setConn(nil)
	o.client.Close()
	o.server.forget(o.conn)
	o.client, o.conn = nil, nil
	for o.outstanding > 0 { // those not answered are in there with an error
		o.answered(<-o.answers)
	}
}

// abandon settles what is left when the node stops: forwarded proposals
// without an answer may have been appended, queued ones were not. Nothing is
// queued any more: the module takes no proposals once it is dead.
func (o *linkOwner) abandon() {
	o.disconnect()
	o.out = o.take(o.out)
	for _, out := range o.out {
		for _, p := range out.batch.proposals {
			p.finish(ErrStopped)
		}
	}
}

// answered steps everything that has been answered, under one lock.
func (o *linkOwner) answered(first *rpc.Call) {
	o.calls = append(o.calls[:0], first)
	for more := true; more; {
		select {
		case c := <-o.answers:
			o.calls = append(o.calls, c)
		default:
			more = false
		}
	}
	o.outstanding -= len(o.calls)
	broken := false
	cm := o.server.cm
	cm.mu.Lock()
	for i, c := range o.calls {
		if c.Error != nil {
			broken = true
		}
		switch c.Args.(type) {
		case *call[readArgs], *call[forwardArgs]:
			o.owed--
		}
		cm.transition(func(core *core) { o.server.stepAnswer(core, o.to, o.directory, c) })
		o.calls[i] = nil
	}
	cm.unlock()
	if broken {
		o.lost()
	} else {
		o.heard = time.Now()
	}
}

func (l *link) setConn(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn, l.hungUp = c, false
}

// connected takes note of an attempt to connect.
func (l *link) connected(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = err
}

// unreached returns why the last attempt to connect to a member failed, nil if it
// did not. The module's lock is held.
func (s *Server) unreached(id NodeID) error {
	m := s.cm.core.configuration.byName(id)
	if m == nil {
		return nil
	}
	for _, ch := range []channel{channelAppend, channelControl} {
		if l := s.links[linkKey{m.id, ch}]; l != nil {
			l.mu.Lock()
			err := l.failure
			l.mu.Unlock()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *link) wasHungUp() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hungUp
}

// stepAnswer gives the answer to one call to the core.
func (s *Server) stepAnswer(c *core, from memberID, directory [16]byte, answer *rpc.Call) {
	switch args := answer.Args.(type) {
	case *call[appendArgs]:
		if answer.Error != nil {
			c.onAppendFailed(from, &args.V)
		} else {
			r := &answer.Reply.(*call[appendReply]).V
			r.directory = directory
			c.onAppendReply(from, &args.V, r)
		}
	case *call[voteArgs]:
		if answer.Error == nil {
			c.onVoteReply(from, &args.V, &answer.Reply.(*call[voteReply]).V)
		}
	case *call[readArgs]:
		s.cm.readsAnswered(&answer.Reply.(*call[readReply]).V, answer.Error)
	case *call[forwardArgs]:
		s.forwardAnswered(from, args.V.batch, &answer.Reply.(*call[forwardReply]).V, answer.Error)
	}
}

// forwardAnswered learns which entries forwarded proposals became. Where the
// leader may have appended them before the connection broke, nobody can tell:
// they are not sent again.
func (s *Server) forwardAnswered(from memberID, b proposalBatch, r *forwardReply, err error) {
	s.forwards[from]--
	cm := s.cm
	switch {
	case err != nil:
		b.finish(outcomeUnknown(fmt.Errorf("raft: forwarding to the leader: %w", err)))
	case r.Refusal == forwardAccepted:
		cm.core.want(r.First.Index + Index(len(b.proposals)) - 1)
		settle(cm.pending.add(r.First, b.proposals))
	case r.Refusal == forwardDiskFull:
		b.finish(ErrDiskFull)
	case r.Refusal == forwardSize:
		b.finish(fmt.Errorf("%w for the leader; make Config.MaxCommandBytes alike on all nodes", ErrCommandSize))
	default:
		cm.core.notLeading(from)
		s.putBack(b)
	}
	cm.pending.forwardEnds()
}

// unsent tells the core, or whoever proposed, that out did not leave.
func (s *Server) unsent(to memberID, out outgoing) {
	cm := s.cm
	switch {
	case out.m.append != nil:
		cm.step(func(c *core) { c.onAppendFailed(to, out.m.append) })
	case out.ask != nil:
		cm.step(func(*core) { cm.readsAnswered(&readReply{Refused: true}, nil) })
	case out.m.vote == nil:
		cm.step(func(c *core) {
			s.forwards[to]--
			c.notLeading(to)
			s.putBack(out.batch)
			cm.pending.forwardEnds()
		})
	}
}

// putBack queues proposals again that certainly were appended nowhere.
func (s *Server) putBack(b proposalBatch) {
	if err := s.cm.queue.putBack(b); err != nil {
		for _, p := range b.proposals {
			p.finish(err)
		}
	}
}

// readEntries performs a read that the core asked for.
func (s *Server) readEntries(q entryRequest) {
	entries, err := s.storage.Read(q.lo, q.hi, q.maxBytes)
	if err != nil {
		s.cm.step(func(c *core) {
			if c.log.start.Index < q.lo { // otherwise it was compacted meanwhile
				c.die(fmt.Errorf("raft: read entry %d for a follower: %w", q.lo, err))
			}
			c.entriesRead(q, nil)
		})
		return
	}
	s.cm.step(func(c *core) { c.entriesRead(q, entries) })
}

// send, hangup, leads, read, canForward, forward and ask are the transport that
// the module drives; its lock is held, so none of them waits.

func (s *Server) send(m message) {
	ch := channelControl
	if m.append != nil && !m.append.Heartbeat {
		ch = channelAppend
	}
	if l := s.link(m.to, ch); l != nil {
		l.push(outgoing{m: m})
	}
}

func (s *Server) hangup(to memberID) {
	if l := s.links[linkKey{to, channelAppend}]; l != nil {
		l.hangup()
	}
}

// leads tells the links who leads: those that wait for a former leader's answers
// wait less long from now on.
func (s *Server) leads(leader memberID) {
	for k, l := range s.links {
		if l.deposed.Store(k.to != leader); k.to != leader {
			wake(l.wakeup)
		}
	}
}

func (s *Server) read(q entryRequest) {
	if l := s.link(q.to, channelAppend); l == nil || !l.push(outgoing{read: &q}) {
		s.cm.core.entriesRead(q, nil) // an answer it must have, or nothing is sent there any more
	}
}

func (s *Server) canForward(to memberID) bool {
	return s.forwards[to] < forwardsAtOnce && s.link(to, channelControl) != nil
}

func (s *Server) forward(to memberID, b proposalBatch) {
	if s.link(to, channelControl).push(outgoing{batch: b}) {
		s.forwards[to]++
		return
	}
	s.cm.core.notLeading(to) // its link is stuck: wait to hear from it
	s.putBack(b)
	s.cm.pending.forwardEnds()
}

func (s *Server) ask(to memberID, lease bool) bool {
	l := s.link(to, channelRead)
	return l != nil && l.push(outgoing{ask: &readArgs{Lease: lease}})
}

type linkKey struct {
	to      memberID
	channel channel
}

// link returns the link to a member, nil if it is none.
func (s *Server) link(to memberID, ch channel) *link {
	k := linkKey{to, ch}
	l := s.links[k]
	if l == nil && s.cm.core.configuration.has(to) {
		l = newLink(s, to, ch)
		s.links[k] = l
	}
	return l
}
