package raft

import (
	"context"
	"encoding/json"
	"errors"
	flags "flag"
	"fmt"
	"go/ast"
	"go/build"
	"go/format"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Mutants are small deliberate bugs, kept as text replacements in
// testdata/mutants, so that no production file holds any. Tests that let one
// live prove less than they seem to.
var (
	runMutants    = flags.String("mutants", "", "build these mutants and run the tests that must catch them: all, numbers like 1,8, or a share like 2/3")
	mutantTimeout = flags.Duration("mutants.timeout", 2*time.Minute, "how long a mutant may survive")
)

type mutant struct {
	path, name, number, file string
	dir, test                string      // the package of the test that catches it, and that test
	edits                    [][2]string // old and new text
}

func readMutants(t *testing.T) (out []mutant) {
	t.Helper()
	paths, err := filepath.Glob("testdata/mutants/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no mutants: %v", err)
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		parts := strings.Split(string(b), "--- old\n")
		m := mutant{path: p, dir: "."}
		for _, edit := range parts[1:] {
			old, replacement, ok := strings.Cut(edit, "--- new\n")
			if !ok {
				t.Fatalf("%s: '--- old' without '--- new'", p)
			}
			m.edits = append(m.edits, [2]string{strings.TrimSuffix(old, "\n"), strings.TrimSuffix(replacement, "\n")})
		}
		if len(m.edits) == 0 {
			t.Fatalf("%s: want a head, '--- old' and '--- new'", p)
		}
		for line := range strings.Lines(parts[0]) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "number":
				m.number = value
			case "name":
				m.name = value
			case "caught by":
				m.test = value
				if dir, test, ok := strings.Cut(value, " "); ok {
					m.dir, m.test = dir, test
				}
			case "file":
				m.file = value
			default:
				t.Fatalf("%s: unknown line %q", p, line)
			}
		}
		out = append(out, m)
	}
	return out
}

// apply returns the mutated file. Each old text must be there exactly once.
func (m *mutant) apply(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(m.file)
	if err != nil {
		t.Fatalf("mutant %s: %v", m.path, err)
	}
	out := string(b)
	for _, e := range m.edits {
		if n := strings.Count(out, e[0]); n != 1 {
			t.Fatalf("mutant %s (%s): this text occurs %d times in %s, want once; write the mutant anew:\n%s", m.path, m.name, n, m.file, e[0])
		}
		out = strings.Replace(out, e[0], e[1], 1)
	}
	return out
}

// hasTest tells whether the package in a directory has a test of that name.
func hasTest(dir, name string) bool {
	paths, _ := filepath.Glob(filepath.Join(dir, "*_test.go"))
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), "\nfunc "+name+"(t *testing.T)") {
			return true
		}
	}
	return false
}

// typeChecker type-checks packages in which one file is replaced.
type typeChecker struct {
	fset     *token.FileSet
	importer types.Importer
	packages map[string]map[string]*ast.File // by directory and path
}

// files parses the files of a package once.
func (c *typeChecker) files(dir string) (map[string]*ast.File, error) {
	if c.packages[dir] == nil {
		c.packages[dir] = map[string]*ast.File{}
		paths, _ := filepath.Glob(filepath.Join(dir, "*.go"))
		for _, p := range paths {
			if match, err := build.Default.MatchFile(dir, filepath.Base(p)); err != nil || !match || strings.HasSuffix(p, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(c.fset, p, nil, parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			c.packages[dir][p] = f
		}
	}
	return c.packages[dir], nil
}

// check type-checks the package of a file, with this text for it, or as it is. A
// file in which only bodies of functions differ can break no other one: the
// bodies of the others are left out then, and what is said of those files.
func (c *typeChecker) check(file, replacement string) error {
	dir := filepath.Dir(file)
	files, err := c.files(dir)
	if err != nil {
		return err
	}
	var list []*ast.File
	alone := false
	if replacement != "" {
		f, err := parser.ParseFile(c.fset, file, replacement, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		list = append(list, f)
		alone = printed(bare(f)) == printed(bare(files[file]))
	}
	for p, f := range files {
		switch {
		case p == file && replacement != "":
		case alone:
			list = append(list, bare(f))
		default:
			list = append(list, f)
		}
	}
	var first error
	conf := types.Config{Importer: c.importer, Error: func(err error) {
		var e types.Error
		if first == nil && (!alone || !errors.As(err, &e) || c.fset.Position(e.Pos).Filename == file) {
			first = err
		}
	}}
	conf.Check(path.Join("example.com/raft", dir), c.fset, list, nil)
	return first
}

// bare is a file without the bodies of its functions, except generic ones, which
// must have theirs.
func bare(f *ast.File) *ast.File {
	without := *f
	without.Comments, without.Decls = nil, nil
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Type.TypeParams == nil {
			declared := *fn
			declared.Doc, declared.Body = nil, nil
			d = &declared
		}
		without.Decls = append(without.Decls, d)
	}
	return &without
}

// printed is a file's source; positions do not matter.
func printed(f *ast.File) string {
	var b strings.Builder
	for _, d := range f.Decls {
		format.Node(&b, token.NewFileSet(), d)
		b.WriteByte('\n')
	}
	return b.String()
}

// TestMutantsApply: each mutant still applies and type-checks, so that it can
// only be caught by a test, and that test is there.
func TestMutantsApply(t *testing.T) {
	t.Parallel()
	fset := token.NewFileSet()
	c := &typeChecker{fset, importer.ForCompiler(fset, "gc", exportData(t)), map[string]map[string]*ast.File{}}
	sound := map[string]bool{} // packages that compile
	for _, m := range readMutants(t) {
		if dir := filepath.Dir(m.file); !sound[dir] {
			if err := c.check(m.file, ""); err != nil {
				t.Fatalf("%s itself does not compile: %v", dir, err)
			}
			sound[dir] = true
		}
		if err := c.check(m.file, m.apply(t)); err != nil {
			t.Errorf("mutant %s does not compile: %v", m.path, err)
		}
		if !hasTest(m.dir, m.test) {
			t.Errorf("mutant %s: there is no %s in %s", m.path, m.test, m.dir)
		}
	}
}

// exportData finds the compiled form of what the package imports.
func exportData(t *testing.T) importer.Lookup {
	t.Helper()
	out, err := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".").Output()
	if err != nil {
		t.Fatalf("go list -export: %v", err)
	}
	where := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		where[path] = file
	}
	return func(path string) (io.ReadCloser, error) { return os.Open(where[path]) }
}

// reasons are what a failing test says, the most telling first: the seed and
// the broken invariant, a panic, its own complaint.
var reasons = []*regexp.Regexp{
	regexp.MustCompile(`seed \d+: [^\n]*`),
	regexp.MustCompile(`(?m)^panic: [^\n]*`),
	regexp.MustCompile(`(?m)^ +\w+\.go:\d+: [^\n]*`),
	regexp.MustCompile(`(?m)^ *--- FAIL: [^\n]*`),
}

var enoughFaults = regexp.MustCompile(`\d+ of its \d+ faults are enough`)

func whyFailed(out string) string {
	for _, r := range reasons {
		if s := r.FindString(out); s != "" {
			return strings.TrimSpace(s)
		}
	}
	return ""
}

// wanted says whether mutant i is among those that were asked for.
func (m *mutant) wanted(t *testing.T, i int) bool {
	if *runMutants == "all" {
		return true
	}
	if k, n, ok := strings.Cut(*runMutants, "/"); ok {
		third, err1 := strconv.Atoi(k)
		of, err2 := strconv.Atoi(n)
		if err := errors.Join(err1, err2); err != nil || of < 1 {
			t.Fatalf("-mutants %s: want all, numbers like 1,8, or a share like 2/3", *runMutants)
		}
		return i%of == third%of
	}
	return strings.Contains(","+*runMutants+",", ","+m.number+",")
}

// TestMutants builds each mutant and runs the test that must catch it.
func TestMutants(t *testing.T) {
	if *runMutants == "" {
		t.Skip("needs -mutants")
	}
	ran := 0
	for i, m := range readMutants(t) {
		if m.wanted(t, i) {
			ran++
			t.Run(m.number, m.run)
		}
	}
	if ran == 0 {
		t.Fatalf("no mutant is meant by -mutants %s", *runMutants)
	}
}

// run builds the mutant and lets the test that must catch it judge it.
func (m *mutant) run(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	mutated := filepath.Join(dir, filepath.Base(m.file))
	overlay := filepath.Join(dir, "overlay.json")
	binary := filepath.Join(dir, "mutant.test")
	j, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(wd, m.file): mutated}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{mutated: m.apply(t), overlay: string(j)} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("go", "test", "-c", "-overlay", overlay, "-o", binary, "./"+m.dir).CombinedOutput(); err != nil {
		t.Fatalf("mutant %s does not build: %v\n%s", m.number, err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), *mutantTimeout+30*time.Second)
	defer cancel()
	args := []string{"-test.run", "^" + m.test + "$", "-test.timeout", fmt.Sprint(*mutantTimeout + 20*time.Second)}
	if m.dir == "." {
		args = append(args, "-sim.base=1", "-sim.shrink=2s", fmt.Sprint("-sim.duration=", *mutantTimeout))
	}
	began := time.Now()
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Dir = filepath.Join(wd, m.dir)
	cmd.Env = append(os.Environ(), "RAPID_NOFAILFILE=true") // its failure is wanted, and nobody will replay it
	out, err := cmd.CombinedOutput()
	took := time.Since(began).Round(10 * time.Millisecond)
	if err == nil || strings.Contains(string(out), "panic: test timed out") {
		t.Fatalf("mutant %s survived %v of %s: %s", m.number, took, m.test, m.name)
	}
	why := whyFailed(string(out))
	if why == "" {
		t.Fatalf("mutant %s: no test failed: %v\n%s", m.number, err, out)
	}
	t.Logf("mutant %s (%s): caught in %v by %s: %s %s", m.number, m.name, took, m.test, why, enoughFaults.Find(out))
}
