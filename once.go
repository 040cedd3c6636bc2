package raft

import (
	"context"
	"errors"
	"fmt"
)

// This file is the user's side of exactly-once clients (session.go): requests
// that may be sent again are sent again, until somebody knows the answer.

// OpenSession opens a session, in which requests take effect once, however often
// and on whichever node they are sent (thesis 6.3). See ProposeOnce.
//
// A session is part of the replicated state. It ends with CloseSession, when no
// request of it was applied for Config.SessionTimeout, or when sessions are too
// many or keep too much (Config.MaxSessions, Config.MaxSessionsBytes). A client
// that is idle keeps its session by sending its newest request again.
//
// The error is one of Propose. After ErrOutcomeUnknown a session may have been
// opened that nobody uses; it ends by itself.
func (s *Server) OpenSession(ctx context.Context) (SessionID, error) {
	limits := s.conf.sessionLimits()
	r, err := s.untilAnswered(ctx, func() *Proposal {
		return s.submit(entryOpenSession, limits.encode(nil), nil, nil, true)
	})
	return sessionIDOf(EntryID{r.Index, r.Term}), err
}

// CloseSession ends a session and drops the results that it keeps. Closing a
// closed session is no error. Otherwise it is one of Propose, or a
// *SessionError.
func (s *Server) CloseSession(ctx context.Context, id SessionID) error {
	_, err := s.untilAnswered(ctx, func() *Proposal {
		return s.submit(entryCloseSession, appendUint64s(nil, uint64(id)), nil, nil, true)
	})
	return err
}

// ProposeOnce is Propose for a command that takes effect once: whoever calls it
// again with the same RequestID, on any node, also after a restart or while the
// first call still waits, gets the original result, with the index and the term
// of the command that was executed. It sends the command again by itself, through
// changes of the leader, until it is answered or ctx ends.
//
// A client numbers its requests by Seq from 1 on. It may have several on their
// way, which are executed in any order. DoneBelow tells which answers it has:
// only results below are dropped, so it must be raised as answers come. A
// command that a RequestID was used for already is not compared with this one.
//
// The error is one of Propose; or a *SessionError, which says that the command
// was not executed now, and which matches ErrSessionExpired if the session is
// over; or a *ResultSizeError. A *SessionError that matches ErrOutcomeUnknown
// too comes after an attempt of this call that may have been executed. After
// ErrOutcomeUnknown call it again with the same RequestID.
func (s *Server) ProposeOnce(ctx context.Context, id RequestID, cmd []byte) (Result, error) {
	switch {
	case id.Seq == 0 || id.DoneBelow > id.Seq:
		return Result{}, &SessionError{Reason: SessionSequence, Session: id.Session, Seq: id.Seq, DoneBelow: id.DoneBelow}
	case id.Seq-id.DoneBelow >= uint64(s.conf.MaxSessionRequests):
		return Result{}, &SessionError{Reason: SessionWindow, Session: id.Session, Seq: id.Seq, DoneBelow: id.DoneBelow}
	}
	head := id.encode()
	return s.untilAnswered(ctx, func() *Proposal { return s.submit(entryOnce, head, cmd, &id, true) })
}

// untilAnswered proposes what may be applied more than once, again and again,
// until the answer is known or this node can't find it out.
func (s *Server) untilAnswered(ctx context.Context, submit func() *Proposal) (Result, error) {
	unknown := false // whether an attempt may have been applied, or may be later
	for {
		r, err := s.await(ctx, submit)
		var size *ResultSizeError
		switch {
		case err == nil || errors.As(err, &size):
			return r, err
		case ctx.Err() == nil && errors.Is(err, ErrSuperseded):
			continue
		case ctx.Err() == nil && errors.Is(err, ErrOutcomeUnknown) && s.applies():
			unknown = true
			s.pauseFor(ctx)
			continue
		}
		if unknown && !errors.Is(err, ErrOutcomeUnknown) {
			err = outcomeUnknown(err)
		}
		return Result{}, err
	}
}

// applies tells whether this node applies entries, so that answers come to it.
func (s *Server) applies() bool {
	s.cm.mu.Lock()
	defer s.cm.unlock()
	return s.cm.pending.stopped == nil
}

// await submits a proposal and waits for it, as Propose says.
func (s *Server) await(ctx context.Context, submit func() *Proposal) (Result, error) {
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("%w: the context had ended before: %w", ErrNoLeader, err)
	}
	p := submit()
	select {
	case <-p.done:
		return p.result, p.err
	case <-ctx.Done():
	}
	if s.cm.queue.withdraw(p) {
		return Result{}, fmt.Errorf("%w: %w", ErrOverloaded, ctx.Err())
	}
	if !isClosed(p.done) && p.abandon() {
		return Result{}, s.untaken(ctx.Err())
	}
	return p.Wait(ctx)
}

// untaken is the error of a proposal or a read that no leader took: what this
// node knows about that, and why the wait ended.
func (s *Server) untaken(why error) error {
	s.cm.mu.Lock()
	known := s.cm.core.whoLeads()
	s.cm.unlock()
	return fmt.Errorf("%w: %s: %w", ErrNoLeader, known, why)
}
