package raft

import (
	"context"
	"encoding/json"
	flags "flag"
	"fmt"
	"go/ast"
	"go/build"
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
	"strings"
	"testing"
	"time"
)

// Mutants are small deliberate bugs, kept as text replacements in
// testdata/mutants, so that no production file holds any. Tests that let one
// live prove less than they seem to.
var (
	runMutants    = flags.String("mutants", "", "build these mutants and run the tests that must catch them: all, or numbers like 1,8")
	mutantTimeout = flags.Duration("mutants.timeout", 2*time.Minute, "how long a mutant may survive")
)

type mutant struct {
	path, name, number, test, file string
	old, new                       string
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
		head, rest, ok1 := strings.Cut(string(b), "--- old\n")
		old, replacement, ok2 := strings.Cut(rest, "--- new\n")
		if !ok1 || !ok2 {
			t.Fatalf("%s: want a head, '--- old' and '--- new'", p)
		}
		m := mutant{path: p, old: strings.TrimSuffix(old, "\n"), new: strings.TrimSuffix(replacement, "\n")}
		for line := range strings.Lines(head) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "number":
				m.number = value
			case "name":
				m.name = value
			case "caught by":
				m.test = value
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

// apply returns the mutated file. The old text must be there exactly once.
func (m *mutant) apply(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(m.file)
	if err != nil {
		t.Fatalf("mutant %s: %v", m.path, err)
	}
	if n := strings.Count(string(b), m.old); n != 1 {
		t.Fatalf("mutant %s (%s): its old text occurs %d times in %s, want once; write the mutant anew", m.path, m.name, n, m.file)
	}
	return strings.Replace(string(b), m.old, m.new, 1)
}

// TestMutantsApply: each mutant still applies and type-checks, so that it can
// only be caught by a test.
func TestMutantsApply(t *testing.T) {
	fset := token.NewFileSet()
	conf := types.Config{Importer: importer.ForCompiler(fset, "gc", exportData(t))}
	parsed := map[string]*ast.File{}
	check := func(file, replacement string) error {
		dir := filepath.Dir(file)
		paths, _ := filepath.Glob(filepath.Join(dir, "*.go"))
		var list []*ast.File
		for _, p := range paths {
			if match, err := build.Default.MatchFile(dir, filepath.Base(p)); err != nil || !match || strings.HasSuffix(p, "_test.go") {
				continue
			}
			if parsed[p] == nil || p == file && replacement != "" {
				var src any
				if p == file && replacement != "" {
					src = replacement
				}
				f, err := parser.ParseFile(fset, p, src, parser.SkipObjectResolution)
				if err != nil {
					return err
				}
				if src != nil {
					list = append(list, f)
					continue
				}
				parsed[p] = f
			}
			list = append(list, parsed[p])
		}
		_, err := conf.Check(path.Join("example.com/raft", dir), fset, list, nil)
		return err
	}
	for _, m := range readMutants(t) {
		if err := check(m.file, ""); err != nil {
			t.Fatalf("%s itself does not compile: %v", filepath.Dir(m.file), err)
		}
		if err := check(m.file, m.apply(t)); err != nil {
			t.Errorf("mutant %s does not compile: %v", m.path, err)
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

var (
	failingSeed  = regexp.MustCompile(`(seed \d+|core_test.go:\d+): [^\n]*`)
	enoughFaults = regexp.MustCompile(`\d+ of its \d+ faults are enough`)
)

// TestMutants builds each mutant and runs the test that must catch it.
func TestMutants(t *testing.T) {
	if *runMutants == "" {
		t.Skip("needs -mutants")
	}
	dir := t.TempDir()
	for _, m := range readMutants(t) {
		if *runMutants != "all" && !strings.Contains(","+*runMutants+",", ","+m.number+",") {
			continue
		}
		t.Run(m.number, func(t *testing.T) {
			wd, err := os.Getwd()
			if err != nil {
				t.Fatal(err)
			}
			mutated := filepath.Join(dir, m.number+"_"+filepath.Base(m.file))
			overlay := filepath.Join(dir, m.number+".json")
			binary := filepath.Join(dir, m.number+".test")
			j, _ := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(wd, m.file): mutated}})
			for name, content := range map[string]string{mutated: m.apply(t), overlay: string(j)} {
				if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := exec.Command("go", "test", "-c", "-overlay", overlay, "-o", binary, ".").CombinedOutput(); err != nil {
				t.Fatalf("mutant %s does not build: %v\n%s", m.number, err, out)
			}
			ctx, cancel := context.WithTimeout(t.Context(), *mutantTimeout+30*time.Second)
			defer cancel()
			began := time.Now()
			cmd := exec.CommandContext(ctx, binary, "-test.run", "^"+m.test+"$", "-sim.base=1", "-sim.shrink=2s", fmt.Sprint("-sim.duration=", *mutantTimeout))
			out, err := cmd.CombinedOutput()
			took := time.Since(began).Round(10 * time.Millisecond)
			if err == nil {
				t.Fatalf("mutant %s survived %v: %s", m.number, took, m.name)
			}
			why := failingSeed.FindAllString(string(out), 2)
			if why == nil {
				t.Fatalf("mutant %s: no test failed: %v\n%s", m.number, err, out)
			}
			t.Logf("%s: caught in %v by %s: %s %s", m.name, took, m.test, why[0], enoughFaults.Find(out))
		})
	}
}
