package raft

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// This file is the networked side of formation.go and handshake.go: who this
// node is in greetings, dialling and accepting, and asking founders until
// entry 1 is decided.

const handshakeTimeout = 5 * time.Second

// me returns who this node is. The module's lock is held.
func (s *Server) me() identity {
	return identity{
		Cluster: s.conf.ClusterID, ClusterUUID: s.cm.core.configuration.clusterUUID,
		Node: s.conf.ID, DirectoryID: s.dirID, Nonce: s.nonce, Boot: s.boot,
		Versions: s.conf.versions,
	}
}

// dial opens a connection to a member for a channel, handshake included, and
// returns the ID of the data directory that answers there.
func (s *Server) dial(to memberID, ch channel) (net.Conn, *rpcClient, [16]byte, error) {
	s.cm.mu.Lock()
	me, known := s.me(), s.cm.core.directoryOf(to)
	var m member
	if found := s.cm.core.configuration.find(to); found != nil {
		m = *found
	}
	s.cm.unlock()
	if m.id == 0 {
		return nil, nil, known, errNoMember
	}
	raw, conn, w, err := s.greet(m.addr, me.hello(m.name, ch))
	if err != nil {
		s.report(m.name, "dialling", err)
		return nil, nil, known, err
	}
	if err := s.judgeWelcome(m.name, w, known); err != nil {
		s.forget(raw)
		s.report(m.name, "dialling", err)
		return nil, nil, known, err
	}
	return raw, newRPCClient(newClientCodec(conn, w.Version, s.codecLimits(ch))), w.DirectoryID, nil
}

// judgeWelcome decides whether a dialled peer may be talked to: by the directory
// ID that the configuration has for it, zero if none, and by its earlier starts.
func (s *Server) judgeWelcome(peer NodeID, w welcome, known [16]byte) error {
	s.cm.mu.Lock()
	defer s.cm.unlock()
	me := s.me()
	if err := me.checkWelcome(peer, w, known); err != nil {
		return err
	}
	if no := s.noteBoot(peer, boot{w.DirectoryID, w.Boot, w.Nonce}); no != nil {
		return &HandshakeError{Reason: no.Reason, Peer: string(peer), Text: no.Text}
	}
	return nil
}

// noteBoot is bootMemory.note with the members preferred. The module's lock is held.
func (s *Server) noteBoot(peer NodeID, b boot) *refusal {
	return s.boots.note(peer, b, func(id NodeID) bool { return s.cm.core.configuration.byName(id) != nil })
}

var errNoMember = errors.New("raft: no such member")

// greet dials addr and introduces this node. raw is to be given to forget.
func (s *Server) greet(addr string, h hello) (raw, conn net.Conn, w welcome, err error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.dialTimeout())
	defer cancel()
	raw, err = s.conf.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, w, err
	}
	if !s.remember(raw, 0) {
		raw.Close()
		return nil, nil, w, ErrStopped
	}
	conn = raw
	if s.conf.TLS != nil {
		conn = tls.Client(raw, tlsFor(s.conf.TLS, addr))
	}
	if w, err = dialHandshake(conn, h, s.dialTimeout()); err != nil {
		s.forget(raw)
		return nil, nil, w, err
	}
	return raw, conn, w, nil
}

// tlsFor names the host to be verified, unless the configuration names one.
func tlsFor(c *tls.Config, addr string) *tls.Config {
	if c.ServerName != "" {
		return c
	}
	c = c.Clone()
	c.ServerName, _, _ = net.SplitHostPort(addr)
	return c
}

// dialTimeout bounds dialling, and then the handshake. A peer that does not
// answer must not hold up the next attempt for long: heartbeats wait for it.
func (s *Server) dialTimeout() time.Duration {
	return min(max(2*s.conf.ElectionTimeout, 500*time.Millisecond), handshakeTimeout)
}

// accept hears who dialled and decides whether it may talk.
func (s *Server) accept(conn net.Conn) (hello, welcome, error) {
	return acceptHandshake(conn, s.conf.versions, func(h hello) (welcome, *refusal) {
		s.cm.mu.Lock()
		defer s.cm.unlock()
		c, me := s.cm.core, s.me()
		var known [16]byte
		// A founder that comes back with another directory learns from entry 1
		// that it is one, which ends it; a refusal here would keep it asking. A
		// member that has the cluster's log and another directory than this node
		// knows was added again, and may lead by now: this node lags.
		if m := c.configuration.byName(h.From); m != nil && h.Channel != channelFormation && h.ClusterUUID == ([16]byte{}) {
			known = c.directoryOf(m.id)
		}
		if no := me.check(h, known); no != nil {
			return welcome{}, no
		}
		formed := len(c.configuration.members) > 0
		switch {
		case c.role == Dead:
			return welcome{}, &refusal{HandshakeStopping, "this node is stopping"}
		case h.Role == roleClient:
			return welcome{}, &refusal{HandshakeRoleRefused, "clients are not served by this release"}
		case h.Channel != channelFormation && !formed && s.formation != nil:
			return welcome{}, &refusal{HandshakeRoleRefused, "this node has not formed or joined a cluster yet"}
		}
		// The formation channel leads to no vote: what it says of a directory
		// must not displace what is remembered of a member's.
		if h.Channel == channelFormation && formed {
			return me.welcome(), nil
		}
		if no := s.noteBoot(h.From, boot{h.DirectoryID, h.Boot, h.Nonce}); no != nil {
			return welcome{}, no
		}
		return me.welcome(), nil
	}, handshakeTimeout)
}

func (s *Server) codecLimits(ch channel) codecLimits {
	l := codecLimits{
		maxBody:      s.conf.MaxFrameBytes + s.conf.MaxCommandBytes + entryHeaderBytes + 4096,
		maxInflight:  max(2*s.conf.MaxInflightAppends, linkWindow) + 1,
		readBuffer:   64 << 10,
		writeTimeout: max(s.conf.ElectionTimeout, time.Second),
		frameTimeout: 30 * time.Second,
		idleTimeout:  inboundIdleTimeout,
	}
	switch ch {
	case channelControl, channelRead:
		l.readBuffer = 4 << 10
	case channelSnapshot:
		l.maxBody = snapshotBlockBytes + maxSnapshotMetaBytes
	}
	return l
}

// startForming prepares an unformed node. The module's lock is held.
func (s *Server) startForming() {
	if len(s.conf.Bootstrap) == 0 {
		s.emit(Event{Kind: EventForming, Detail: "empty data directory and empty Bootstrap: waiting to be added by a member of the cluster"})
		return
	}
	f, err := newFormation(s.conf.ClusterID, s.conf.ID, s.dirID, s.conf.Bootstrap)
	if err != nil {
		s.cm.transition(func(c *core) { c.die(err) })
		return
	}
	s.formation = f
	if s.cm.start(s.runForming) {
		s.cm.diskUsers.add()
	}
}

func (s *Server) emit(e Event) {
	e.Time = time.Now()
	s.events.add([]Event{e})
}

// runForming asks the other founders until entry 1 is decided, makes it
// durable, and puts the node into its cluster. It ends then, or with the node.
func (s *Server) runForming() {
	defer s.cm.leaveDisk()
	said := ""
	for {
		s.cm.mu.Lock()
		missing, done := s.formation.missing(), s.formation.done()
		if s.formation.late {
			s.formation = nil
			s.emit(Event{Kind: EventForming, Detail: "the cluster has formed and gone on: waiting for its leader"})
			s.cm.unlock()
			return
		}
		s.cm.unlock()
		if done {
			s.formed()
			return
		}
		if now := fmt.Sprint(missing); now != said {
			said = now
			s.emit(Event{Kind: EventForming, Detail: "waiting to hear from " + joinIDs(missing)})
			s.events.log()
		}
		// Also those that were heard: one may have formed since, when it had heard
		// everybody, or have lost its directory.
		for _, m := range s.conf.Bootstrap {
			if m.ID == s.conf.ID {
				continue
			}
			if err := s.askFounder(m.ID, m.Addr); err != nil {
				s.report(m.ID, "forming", err)
			}
		}
		s.cm.mu.Lock()
		done = s.formation.done() || s.formation.late
		s.cm.unlock()
		if !done {
			s.pauseForming()
		}
		if s.stopping() {
			return
		}
	}
}

// pauseForming waits before founders are asked again, or until all is decided.
func (s *Server) pauseForming() {
	t := time.NewTimer(min(s.conf.HeartbeatInterval, formingInterval))
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.formWake:
	case <-s.ctx.Done():
	}
}

const formingInterval = 100 * time.Millisecond

func joinIDs(ids []NodeID) string {
	var b strings.Builder
	for i, id := range ids {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(string(id))
	}
	return b.String()
}

// askFounder exchanges with one founder what both know.
func (s *Server) askFounder(id NodeID, addr string) error {
	s.cm.mu.Lock()
	me, mine := s.me(), s.formation.answer()
	s.cm.unlock()
	raw, conn, w, err := s.greet(addr, me.hello(id, channelFormation))
	if err != nil {
		return err
	}
	defer s.forget(raw)
	if err := s.judgeWelcome(id, w, [16]byte{}); err != nil {
		return err
	}
	its, err := dialFormation(conn, mine, s.dialTimeout())
	if err != nil {
		return err
	}
	if its.DirectoryID != w.DirectoryID {
		return &HandshakeError{Reason: HandshakeMalformed, Peer: string(id), Text: "it gives two directory IDs"}
	}
	return s.heardFounder(id, its)
}

// heardFounder takes what a founder said. A contradiction ends the node:
// nothing that it could do by itself would resolve it.
func (s *Server) heardFounder(id NodeID, a formAnswer) error {
	s.cm.mu.Lock()
	defer s.cm.unlock()
	if s.formation == nil || s.cm.core.role == Dead {
		return nil
	}
	done, err := s.formation.heard(id, a)
	if done {
		wake(s.formWake)
	}
	var final *FormationError
	if errors.As(err, &final) {
		s.cm.transition(func(c *core) { c.die(err) })
	}
	return err
}

// formed steps the decided entry 1 into the core and makes it durable; only
// then others are told of it.
func (s *Server) formed() {
	s.cm.mu.Lock()
	conf, self := s.formation.configuration()
	entry1 := s.formation.entry1()
	s.cm.transition(func(c *core) { c.form(self, entry1, conf) })
	s.cm.unlock()
	if s.cm.flush() != nil {
		return
	}
	s.cm.mu.Lock()
	s.formation.saved()
	s.emit(Event{Kind: EventFormed, Detail: describeMembers(conf.list())})
	s.cm.unlock()
}

// answerFormation tells a founder where this node stands. A node that holds a
// log answers with its entry 1.
func (s *Server) answerFormation(conn net.Conn, h hello) error {
	var heard *formAnswer
	err := acceptFormation(conn, func(its formAnswer) (formAnswer, error) {
		s.cm.mu.Lock()
		f := s.formation
		s.cm.unlock()
		if f == nil {
			return s.answerFormed()
		}
		if its.DirectoryID != h.DirectoryID {
			return formAnswer{}, errors.New("raft: the founder gives two directory IDs")
		}
		heard = &its
		s.cm.mu.Lock()
		defer s.cm.unlock()
		return f.answer(), nil
	}, handshakeTimeout)
	if heard == nil {
		return err
	}
	// Only now, because it may end this node: the other side must hear of the
	// contradiction too.
	return cmp.Or(s.heardFounder(h.From, *heard), err)
}

// answerFormed is the answer of a node that recovered its log: entry 1, or, if
// that was compacted, the configuration now.
func (s *Server) answerFormed() (formAnswer, error) {
	s.cm.mu.Lock()
	c := s.cm.core
	if len(c.configuration.members) == 0 || c.role == Dead {
		s.cm.unlock()
		return formAnswer{}, errors.New("raft: this node has no first entry to show: it is not formed")
	}
	if c.log.start.Index > 0 {
		conf := c.configs[0].conf
		s.cm.unlock()
		return formAnswer{DirectoryID: s.dirID, Config: conf.encode()}, nil
	}
	runs, ok := c.log.from(1, 1, 1)
	if !ok {
		s.cm.diskUsers.add()
	}
	s.cm.unlock()
	if !ok {
		var err error
		runs, err = s.storage.Read(1, 1, 1)
		s.cm.leaveDisk()
		if err != nil {
			return formAnswer{}, err
		}
	}
	return formAnswer{DirectoryID: s.dirID, Entry1: runs[0].Encoded()}, nil
}
