package raft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
)

// AddVoter adds a node as a learner, brings it up to date and makes it a
// voter, or makes a voter of a learner. It returns once that is committed. Only
// the leader changes the membership; the error is a *MembershipError, after
// which nothing was changed (but see MembershipReplaced), ErrSuperseded,
// ErrStopped, or matches ErrOutcomeUnknown: then Status shows what became of
// it, and a later leader may finish it. While the node has not caught up,
// that error is also a *LaggingError, which says why it can't be reached; Remove
// takes the change back.
func (s *Server) AddVoter(ctx context.Context, m Member) error {
	m.Learner = false
	return s.changeMembers(ctx, func(list []Member) ([]Member, error) {
		i := slices.IndexFunc(list, func(o Member) bool { return o.ID == m.ID })
		switch {
		case i < 0:
			return append(list, m), nil
		case !list[i].Learner:
			return nil, &MembershipError{Reason: MembershipExists, Node: m.ID}
		}
		if list[i].Learner = false; m.Addr != "" {
			list[i].Addr = m.Addr
		}
		return list, nil
	})
}

// AddLearner adds a node that receives the log and does not vote. See AddVoter for errors.
func (s *Server) AddLearner(ctx context.Context, m Member) error {
	m.Learner = true
	return s.changeMembers(ctx, func(list []Member) ([]Member, error) {
		if slices.ContainsFunc(list, func(o Member) bool { return o.ID == m.ID }) {
			return nil, &MembershipError{Reason: MembershipExists, Node: m.ID}
		}
		return append(list, m), nil
	})
}

// Remove takes a member out of the cluster. See AddVoter for errors.
func (s *Server) Remove(ctx context.Context, id NodeID) error {
	return s.changeMembers(ctx, func(list []Member) ([]Member, error) { return without(list, id) })
}

// Replace adds a node and, once it has caught up, makes it a voter and removes
// another in one step. See AddVoter for errors.
func (s *Server) Replace(ctx context.Context, id NodeID, m Member) error {
	return s.changeMembers(ctx, func(list []Member) ([]Member, error) {
		if slices.ContainsFunc(list, func(o Member) bool { return o.ID == m.ID }) {
			return nil, &MembershipError{Reason: MembershipExists, Node: m.ID}
		}
		list, err := without(list, id)
		return append(list, m), err
	})
}

func without(list []Member, id NodeID) ([]Member, error) {
	i := slices.IndexFunc(list, func(o Member) bool { return o.ID == id })
	if i < 0 {
		return nil, &MembershipError{Reason: MembershipUnknown, Node: id}
	}
	return slices.Delete(list, i, i+1), nil
}

// ChangeMembers makes the cluster have exactly these members, in one change:
// members not listed leave, new ones are added, known ones change their address
// or their vote. See AddVoter for errors.
func (s *Server) ChangeMembers(ctx context.Context, list []Member) error {
	list = slices.Clone(list)
	return s.changeMembers(ctx, func([]Member) ([]Member, error) { return list, nil })
}

// changeMembers proposes what edit makes of the members, and waits until the
// cluster is there.
func (s *Server) changeMembers(ctx context.Context, edit func([]Member) ([]Member, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.leaveInheritance(ctx); err != nil {
		return fmt.Errorf("raft: membership not changed: this node was recovered, and first needs a snapshot for those that are added: %w", err)
	}
	cm := s.cm
	var id EntryID
	var before, after []Member
	err := ErrStopped
	cm.step(func(c *core) {
		if c.role == Dead {
			return
		}
		id, err = c.changeMembers(func(list []Member) (out []Member, err error) {
			before = slices.Clone(list)
			if after, err = edit(list); err == nil {
				err = checkMembers(after)
			}
			return after, err
		})
	})
	if err != nil {
		return err
	}
	known := false
	err = s.waitFor(ctx, func(c *core) (done bool, err error) {
		done, err = c.changeDone(id)
		if done && err == nil && !tookEffect(before, after, c.configuration.list()) {
			err = &MembershipError{Reason: MembershipReplaced}
		}
		known = done
		return done, err
	})
	if err != nil && !known {
		cm.mu.Lock()
		err = cm.core.unfinished(err)
		var lagging *LaggingError
		if errors.As(err, &lagging) {
			lagging.Unreached = s.unreached(lagging.Node)
		}
		cm.unlock()
		err = outcomeUnknown(err)
	}
	return err
}

// leaveInheritance takes the snapshot with which a leader that was recovered drops
// the log of its former cluster. It does nothing on others.
func (s *Server) leaveInheritance(ctx context.Context) error {
	cm := s.cm
	cm.mu.Lock()
	needed := cm.core.role == Leader && cm.core.log.start.Index < cm.core.inherited
	from := cm.core.inherited
	cm.unlock()
	if !needed {
		return nil
	}
	if err := s.WaitApplied(ctx, from); err != nil {
		return err
	}
	return s.TakeSnapshot(ctx)
}

// tookEffect tells whether what differs between before and after is now so.
func tookEffect(before, after, now []Member) bool {
	same := func(list []Member, m Member) bool {
		return slices.ContainsFunc(list, func(o Member) bool { return o.ID == m.ID && o.Learner == m.Learner })
	}
	for _, m := range after {
		if !same(before, m) && !same(now, m) {
			return false
		}
	}
	return !slices.ContainsFunc(before, func(m Member) bool {
		id := func(o Member) bool { return o.ID == m.ID }
		return !slices.ContainsFunc(after, id) && slices.ContainsFunc(now, id)
	})
}

func checkMembers(list []Member) error {
	ids, addrs := map[NodeID]bool{}, map[string]bool{}
	for _, m := range list {
		host, port, err := net.SplitHostPort(m.Addr)
		if err != nil || host == "" || port == "" || port == "0" || m.ID == "" || len(m.ID) > 255 || ids[m.ID] {
			return &MembershipError{Reason: MembershipBad, Node: m.ID}
		}
		if addrs[m.Addr] {
			return &MembershipError{Reason: MembershipSameAddr, Node: m.ID}
		}
		ids[m.ID], addrs[m.Addr] = true, true
	}
	return nil
}

// TransferLeadership hands leadership to a voter, "" for the one that is most
// up to date, and returns once another node leads. Proposals made meanwhile
// wait. The error is a *TransferError, ctx's, or ErrStopped; after one this
// node may still lead.
func (s *Server) TransferLeadership(ctx context.Context, to NodeID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	cm := s.cm
	err := ErrStopped
	cm.step(func(c *core) {
		if c.role == Dead {
			return
		}
		var id memberID
		if to != "" {
			m := c.configuration.byName(to)
			if m == nil {
				err = &TransferError{Reason: TransferNotVoter, Node: to}
				return
			}
			id = m.id
		}
		err = c.transferLeadership(id)
	})
	if err != nil || to == s.conf.ID {
		return err
	}
	return s.waitFor(ctx, func(c *core) (bool, error) {
		switch {
		case c.role == Leader && c.transfer.to == 0:
			return true, &TransferError{Reason: TransferTimeout, Node: to}
		case c.role != Leader && c.leader != 0:
			return true, nil
		}
		return false, nil
	})
}

// waitFor looks at the core whenever its role, leader or membership has
// changed, until f is done. The error is f's, ctx's, or ErrStopped.
func (s *Server) waitFor(ctx context.Context, f func(c *core) (bool, error)) error {
	cm := s.cm
	for {
		cm.mu.Lock()
		done, err := f(cm.core)
		changed := cm.changed
		cm.unlock()
		if done {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-cm.done:
			return ErrStopped
		}
	}
}
